/* The response cache: the same request again is answered from it, with the same tokens and without a step, until it is
 * forgotten. Argument: the model's folder. */
#include "check.h"

static ns_llm_engine open_keeping(const char *model, uint64_t bytes) {
    ns_llm_engine engine = 0;
    ns_llm_engine_params params = {.struct_size = sizeof params,
                                   .model = {model, strlen(model)},
                                   .threads = 1,
                                   .kv_bytes = 32 << 20,
                                   .flags = NS_LLM_ENGINE_ADAPTIVE_RESPONSE_TTL,
                                   .response_cache_bytes = bytes,
                                   .response_ttl_ms = 600000};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_open(&params, &engine));
    return engine;
}

static heard ask(ns_llm_engine engine, const ns_llm_request_params *params) {
    static heard h;
    ns_llm_request request = 0;
    memset(&h, 0, sizeof h);
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, params, listen, &h, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK(h.num_last == 1 && h.num_after_last == 0 && h.num_finished == 1);
    return h;
}

static ns_llm_response_cache_stats stats_of(ns_llm_engine engine) {
    ns_llm_response_cache_stats stats = {.struct_size = sizeof stats};
    CHECK_STATUS(NS_LLM_OK, ns_llm_responses_stats(engine, &stats));
    return stats;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    static heard first, second;
    ns_llm_engine engine = open_keeping(argv[1], 1 << 20);
    ns_llm_text tags[] = {TEXT("story"), TEXT("all")};
    ns_llm_request_params params = story(12);
    params.response_tags = tags;
    params.num_response_tags = 2;

    first = ask(engine, &params);
    CHECK(first.summary.from_response_cache == 0 && first.num_token_ids == 12);
    second = ask(engine, &params);
    CHECK(second.summary.from_response_cache == 1 && second.summary.completion_tokens == 12);
    CHECK(second.num_token_ids == 12 && memcmp(first.token_ids, second.token_ids, 12 * sizeof(uint32_t)) == 0);
    CHECK(first.text_size == second.text_size && memcmp(first.text, second.text, first.text_size) == 0);
    CHECK(first.finish_reason == second.finish_reason);

    ns_llm_response_cache_stats stats = stats_of(engine);
    CHECK(stats.answers_total == 1 && stats.hits_total == 1 && stats.misses_total == 1 && stats.stores_total == 1);
    CHECK(stats.entries == 1 && stats.bytes > 0 && stats.max_bytes == 1 << 20);

    /* Another namespace has answers of its own; a request may want none. */
    ns_llm_request_params other = params;
    other.cache_namespace = (ns_llm_text)TEXT("other");
    CHECK(ask(engine, &other).summary.from_response_cache == 0);
    other = params;
    other.response_cache = NS_LLM_RESPONSE_CACHE_OFF;
    CHECK(ask(engine, &other).summary.from_response_cache == 0);
    other.response_cache = NS_LLM_RESPONSE_CACHE_READ;
    CHECK(ask(engine, &other).summary.from_response_cache == 1);

    size_t num = 7;
    CHECK_STATUS(NS_LLM_OK, ns_llm_responses_invalidate(engine, "nobody", 6, &num));
    CHECK(num == 0 && stats_of(engine).entries == 2);
    CHECK_STATUS(NS_LLM_OK, ns_llm_responses_invalidate(engine, "story", 5, &num));
    CHECK(num == 2 && stats_of(engine).entries == 0);
    CHECK(ask(engine, &params).summary.from_response_cache == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_responses_clear(engine));
    CHECK(ask(engine, &params).summary.from_response_cache == 0);
    CHECK(ask(engine, &params).summary.from_response_cache == 1);

    /* A program that was built before there was a cache asks as it always did. */
    params.struct_size = offsetof(ns_llm_request_params, response_cache);
    CHECK(ask(engine, &params).summary.from_response_cache == 1);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));

    engine = open_keeping(argv[1], 0);
    params = story(4);
    ask(engine, &params);
    CHECK(ask(engine, &params).summary.from_response_cache == 0 && stats_of(engine).misses_total == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    puts("ok");
    return 0;
}
