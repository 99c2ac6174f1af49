/** Makes the kernels of one .cu file callable from outside by name, with arguments as the CUDA driver takes them: an array of
 *  pointers to them. A generated file includes this behind the kernels and lists them with `SHIM_KERNELS`. */
#pragma once

#include <cstdio>
#include <utility>

#include "block.h"

namespace cpu {

/** One argument, and the bytes that the caller says it has. */
struct Argument {
    const void* value;
    size_t bytes;
};

struct LaunchParameters {
    unsigned grid[3], block[3];
    size_t shared_bytes;
    unsigned order, landing, seed;
    KernelBefore before;  // null: it has run
};

template <class T>
T take(const Argument& argument) {
    T value;
    memcpy(static_cast<void*>(&value), argument.value, sizeof value);
    return value;
}

template <class... Parameters, size_t... index>
std::string launch_with(void (*kernel)(Parameters...), const LaunchParameters& parameters, const Argument* arguments,
                        size_t num_arguments, std::index_sequence<index...>) {
    const size_t sizes[] = {sizeof(Parameters)...};
    if (num_arguments != sizeof...(Parameters)) {
        return "takes " + std::to_string(sizeof...(Parameters)) + " arguments, was given " + std::to_string(num_arguments);
    }
    for (size_t i = 0; i < num_arguments; i++) {
        if (sizes[i] == arguments[i].bytes) continue;
        return "argument " + std::to_string(i) + " has " + std::to_string(sizes[i]) + " bytes, was given " +
               std::to_string(arguments[i].bytes);
    }
    const dim3 grid(parameters.grid[0], parameters.grid[1], parameters.grid[2]);
    const dim3 block(parameters.block[0], parameters.block[1], parameters.block[2]);
    const Schedule schedule{static_cast<Order>(parameters.order), static_cast<Landing>(parameters.landing),
                            parameters.seed};
    return launch(grid, block, parameters.shared_bytes, schedule, parameters.before,
                  [&] { kernel(take<Parameters>(arguments[index])...); });
}

using Entry = std::string (*)(const LaunchParameters&, const Argument*, size_t);

struct Named {
    const char* name;
    Entry entry;
};

template <class Kernel, Kernel kernel>
struct Exported;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Exported<void (*)(Parameters...), kernel> {
    static std::string run(const LaunchParameters& parameters, const Argument* arguments, size_t num_arguments) {
        return launch_with(kernel, parameters, arguments, num_arguments, std::index_sequence_for<Parameters...>{});
    }
};

}  // namespace cpu

/** A kernel in the list of `SHIM_KERNELS`. */
#define SHIM_KERNEL(name) {#name, &cpu::Exported<decltype(&name), &name>::run}

/** Defines `shim_launch`: 0 when the kernel ran; 1 when it does not exist or broke a rule, which `message` then says. */
#define SHIM_KERNELS(...)                                                                                              \
    extern "C" int shim_launch(const char* name, const cpu::LaunchParameters* parameters,                              \
                               const cpu::Argument* arguments, size_t num_arguments, char* message,                    \
                               size_t message_bytes) {                                                                 \
        static const cpu::Named kernels[] = {__VA_ARGS__};                                                             \
        std::string error = "no such kernel";                                                                          \
        for (const cpu::Named& kernel : kernels) {                                                                     \
            if (strcmp(kernel.name, name) == 0) error = kernel.entry(*parameters, arguments, num_arguments);           \
        }                                                                                                              \
        snprintf(message, message_bytes, "%s", error.c_str());                                                         \
        return error.empty() ? 0 : 1;                                                                                  \
    }
