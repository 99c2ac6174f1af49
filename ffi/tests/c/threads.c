/* Many threads on one engine, each at its own pace: submit, wait, cancel, free, tokenize and ask, in a seeded
 * random order. Every request ends exactly once; finished stories are equal whoever else was running; errors stay
 * with their thread.
 * Arguments: the model's folder, threads, rounds of each thread. */
#include "check.h"

#include <pthread.h>

static ns_llm_engine engine;
static int num_rounds;
static heard expected;
static atomic_int num_stories, num_cancelled;

enum { STORY_TOKENS = 8 };

/* xorshift64 (Marsaglia 2003): each thread has its own state. */
static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void one_request(uint64_t *random) {
    heard *h = calloc(1, sizeof *h);
    CHECK(h != NULL);
    ns_llm_request request = 0;
    ns_llm_request_params params = story(STORY_TOKENS);
    bool cancel = next(random) % 3 == 0, free_at_once = next(random) % 4 == 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, h, &request));
    if (cancel)
        CHECK_STATUS(NS_LLM_OK, ns_llm_request_cancel(request));
    if (!free_at_once) {
        ns_llm_status status = ns_llm_request_wait(request, NS_LLM_FOREVER, NULL);
        CHECK(status == NS_LLM_OK || (cancel && status == NS_LLM_CANCELLED));
    }
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    /* The end was told before the request was gone, so its memory is ours again. */
    CHECK(h->num_last == 1 && h->num_after_last == 0);
    if (h->status == NS_LLM_OK) {
        CHECK(h->text_size == expected.text_size && memcmp(h->text, expected.text, h->text_size) == 0);
        num_stories++;
    } else {
        CHECK(h->status == NS_LLM_CANCELLED && (cancel || free_at_once));
        num_cancelled++;
    }
    free(h);
}

/* The sentence about an error is the thread's own, while all other threads fail too. */
static void one_error(uint64_t *random) {
    ns_llm_request bad = next(random);
    char sentence[64];
    snprintf(sentence, sizeof sentence, "%#llx is not a live", (unsigned long long)bad);
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_request_cancel(bad));
    CHECK(strncmp(ns_llm_last_error(NULL), sentence, strlen(sentence)) == 0);
}

static void one_question(void) {
    uint32_t ids[16];
    size_t num = 0;
    char text[64];
    ns_llm_model_info info = {.struct_size = sizeof info};
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(engine, "a cat", 5, 0, ids, 16, &num));
    CHECK_STATUS(NS_LLM_OK, ns_llm_detokenize(engine, ids, num, text, sizeof text, &num));
    CHECK(num == 5);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(engine, &info));
    CHECK(info.vocab_size > 0);
}

static void *work(void *seed) {
    uint64_t random = (uint64_t)(uintptr_t)seed * 0x9e3779b97f4a7c15u + 1;
    for (int round = 0; round < num_rounds; round++) {
        one_request(&random);
        one_error(&random);
        one_question();
    }
    return NULL;
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    int num_threads = atoi(argv[2]);
    num_rounds = atoi(argv[3]);
    engine = open_engine(argv[1]);

    ns_llm_request request = 0;
    ns_llm_request_params params = story(STORY_TOKENS);
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, &expected, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));

    pthread_t threads[64];
    CHECK(num_threads <= 64);
    for (int i = 0; i < num_threads; i++)
        CHECK(pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)(i + 1)) == 0);
    for (int i = 0; i < num_threads; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(num_stories > 0 && num_cancelled > 0);
    printf("%d stories, %d cancelled\n", num_stories, num_cancelled);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    return 0;
}
