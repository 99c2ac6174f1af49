/* Loading the library and unloading it again leaves the process as it was: the surroundings, the number of threads and of
 * open files. The library is loaded by hand, so that there is a before.
 * Argument: the shared library. */
#include <dirent.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                  \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

#include <stdio.h>

#include "ns_llm.h"
#include "surroundings.h"

static int num_entries(const char *folder) {
    DIR *entries = opendir(folder);
    CHECK(entries != NULL);
    int num = 0;
    while (readdir(entries) != NULL)
        num++;
    closedir(entries);
    return num;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    static surroundings before;
    look_around(&before);
    int num_threads = num_entries("/proc/self/task"), num_files = num_entries("/proc/self/fd");
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    CHECK(library != NULL);
    uint32_t (*abi_version)(void);
    /* The way that POSIX gives from an object pointer to a function pointer. */
    *(void **)&abi_version = dlsym(library, "ns_llm_abi_version");
    CHECK(abi_version != NULL && abi_version() == NS_LLM_ABI_VERSION);
    surroundings_are_as(&before);
    CHECK(num_entries("/proc/self/task") == num_threads && num_entries("/proc/self/fd") == num_files);
    CHECK(dlclose(library) == 0);
    surroundings_are_as(&before);
    puts("ok");
    return 0;
}
