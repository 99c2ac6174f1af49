/* What belongs to the process and not to a library in it, looked at before and after. */
#ifndef SURROUNDINGS_H
#define SURROUNDINGS_H

#include <fenv.h>
#include <locale.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#ifndef CHECK
#error "include check.h, or say what CHECK does"
#endif

extern char **environ;

typedef struct surroundings {
    struct sigaction actions[32];
    sigset_t blocked;
    char locale[256], folder[1024];
    mode_t mask;
    struct rlimit limits[RLIM_NLIMITS];
    int rounding;
    unsigned float_control;
    size_t environment_bytes;
    unsigned long environment_sum;
} surroundings;

static inline void look_around(surroundings *s) {
    memset(s, 0, sizeof *s);
    for (int number = 1; number < 32; number++)
        CHECK(sigaction(number, NULL, &s->actions[number]) == 0);
    CHECK(sigprocmask(SIG_BLOCK, NULL, &s->blocked) == 0);
    snprintf(s->locale, sizeof s->locale, "%s", setlocale(LC_ALL, NULL));
    CHECK(getcwd(s->folder, sizeof s->folder) != NULL);
    s->mask = umask(0);
    umask(s->mask);
    for (int kind = 0; kind < (int)RLIM_NLIMITS; kind++)
        CHECK(getrlimit((unsigned)kind, &s->limits[kind]) == 0);
    s->rounding = fegetround();
#ifdef __SSE__
    /* The flags of past operations are the thread's own business; the modes are not. */
    s->float_control = _mm_getcsr() & ~0x3fu;
#endif
    for (char **entry = environ; *entry != NULL; entry++)
        for (const char *c = *entry; *c != 0; c++)
            s->environment_bytes++, s->environment_sum = s->environment_sum * 31 + (unsigned char)*c;
}

/* No signal handler, signal mask, locale, folder, file mask, limit, environment or floating-point mode has changed. */
static inline void surroundings_are_as(const surroundings *before) {
    surroundings now;
    look_around(&now);
    for (int number = 1; number < 32; number++) {
        CHECK(now.actions[number].sa_handler == before->actions[number].sa_handler);
        CHECK(sigismember(&now.blocked, number) == sigismember(&before->blocked, number));
    }
    CHECK(strcmp(now.locale, before->locale) == 0 && strcmp(now.folder, before->folder) == 0);
    CHECK(now.mask == before->mask);
    for (int kind = 0; kind < (int)RLIM_NLIMITS; kind++)
        CHECK(now.limits[kind].rlim_cur == before->limits[kind].rlim_cur &&
              now.limits[kind].rlim_max == before->limits[kind].rlim_max);
    CHECK(now.rounding == before->rounding && now.float_control == before->float_control);
    CHECK(now.environment_bytes == before->environment_bytes && now.environment_sum == before->environment_sum);
    volatile float small = 1.2e-38f;
    CHECK(small / 4 > 0);
}

#endif
