/* KV that outlives its engine: what one has computed, the next over the same directory finds on disk, and answers the same;
 * each place beside the pool tells what it holds; a flush is answered in every state, and says what was not stored.
 * Arguments: the model's folder, and a folder that does not exist. */
#include "check.h"

#include <unistd.h>

static const char *model, *folder;

static ns_llm_engine open_over(const char *directory, uint64_t host_bytes) {
    ns_llm_engine engine = 0;
    ns_llm_engine_params params = {.struct_size = sizeof params,
                                   .model = {model, strlen(model)},
                                   .threads = 1,
                                   .kv_bytes = 32 << 20,
                                   .kv_host_bytes = host_bytes,
                                   .kv_cache_dir = {directory, directory ? strlen(directory) : 0},
                                   .kv_disk_bytes = directory ? 64 << 20 : 0,
                                   /* A busy machine is no reason to compute what is there. */
                                   .kv_load_budget_ms = 60000};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_open(&params, &engine));
    return engine;
}

/* The same long prompt each time. */
static ns_llm_summary answer(ns_llm_engine engine, heard *h) {
    ns_llm_request_params params = story(8);
    const char *prompt = "Once upon a time there was a little dog who lived in a big house near the sea, and every day the "
                         "dog ran to the water and looked at the boats.";
    ns_llm_request request = 0;
    ns_llm_summary summary = {.struct_size = sizeof summary};
    params.prompt = (ns_llm_text){prompt, strlen(prompt)};
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(engine, &params, listen, h, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, &summary));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK(summary.cached_tokens == summary.cached_pool_tokens + summary.cached_host_tokens + summary.cached_disk_tokens +
                                       summary.cached_remote_tokens);
    return summary;
}

static ns_llm_kv_tier_stats tier(ns_llm_engine engine, ns_llm_kv_tier which) {
    ns_llm_kv_tier_stats stats = {.struct_size = sizeof stats};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_kv_tier(engine, which, &stats));
    return stats;
}

static void kv_outlives_its_engine(void) {
    static heard first_heard, second_heard;
    ns_llm_engine engine = open_over(folder, 0);
    ns_llm_summary cold = answer(engine, &first_heard);
    CHECK(cold.cached_tokens == 0 && cold.prefix_miss == NS_LLM_PREFIX_MISS_NEVER_SEEN && cold.prefix_miss_token == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_flush(engine));
    ns_llm_kv_tier_stats disk = tier(engine, NS_LLM_KV_TIER_DISK);
    CHECK(disk.is_there == 1 && disk.stored_total >= 2 && disk.blocks == disk.stored_total && disk.faults_total == 0);
    CHECK(tier(engine, NS_LLM_KV_TIER_HOST).hits_total == 0 && tier(engine, NS_LLM_KV_TIER_REMOTE).is_there == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_flush(engine));

    engine = open_over(folder, 1 << 20);
    ns_llm_summary summary = answer(engine, &second_heard);
    CHECK(summary.cached_disk_tokens >= 32 && summary.cached_disk_tokens == summary.cached_tokens);
    CHECK(summary.prefix_miss == NS_LLM_PREFIX_MISS_NONE);
    CHECK(first_heard.num_token_ids == second_heard.num_token_ids);
    CHECK(memcmp(first_heard.token_ids, second_heard.token_ids, first_heard.num_token_ids * sizeof(uint32_t)) == 0);
    disk = tier(engine, NS_LLM_KV_TIER_DISK);
    CHECK(disk.hits_total * 16 == summary.cached_disk_tokens && disk.hit_bytes_total > 0 && disk.bytes >= disk.hit_bytes_total);
    CHECK(tier(engine, NS_LLM_KV_TIER_HOST).is_there == 1);
    ns_llm_stats stats = {.struct_size = sizeof stats};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_stats(engine, &stats));
    CHECK(stats.prefix_cache_disk_hits_total == summary.cached_disk_tokens);
    CHECK(stats.prefix_cache_pool_hits_total + stats.prefix_cache_host_hits_total == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
}

/* What is cleared is not found: in the pool, on disk, by the next engine. */
static void cleared_kv_is_gone(void) {
    static heard h;
    ns_llm_engine engine = open_over(folder, 0);
    CHECK(answer(engine, &h).cached_tokens >= 32);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_clear_prefix_cache(engine));
    CHECK(tier(engine, NS_LLM_KV_TIER_DISK).blocks == 0);
    CHECK(answer(engine, &h).cached_tokens == 0 && answer(engine, &h).cached_tokens >= 32);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_clear_prefix_cache(engine));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    CHECK_STATUS(NS_LLM_BAD_HANDLE, ns_llm_engine_clear_prefix_cache(engine));
    engine = open_over(folder, 0);
    CHECK(answer(engine, &h).cached_tokens == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
}

/* Who may not write a directory knows it from the beginning, and a flush says once what is not stored there. */
static void a_flush_says_what_was_not_stored(void) {
    static heard h;
    ns_llm_engine writer = open_over(folder, 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_clear_prefix_cache(writer));
    ns_llm_engine reader = open_over(folder, 0);
    ns_llm_model_info info = {.struct_size = sizeof info};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(writer, &info));
    CHECK(info.kv_disk_refusal.size == 0 && info.kv_tier_encoding.size == strlen("as-computed"));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(reader, &info));
    CHECK(info.kv_disk_refusal.size == strlen("another process writes to this tier"));
    CHECK(answer(reader, &h).cached_tokens == 0);
    CHECK_STATUS(NS_LLM_NOT_STORED, ns_llm_engine_flush(reader));
    CHECK(strstr(ns_llm_last_error(NULL), "KV blocks were not stored") != NULL);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_flush(reader));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(reader));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(writer));
}

/* Without a directory there is nothing to wait for, and no tier. */
static void engines_without_tiers_say_so(void) {
    static heard h;
    ns_llm_engine engine = open_over(NULL, 0);
    CHECK(answer(engine, &h).cached_tokens == 0 && answer(engine, &h).cached_pool_tokens >= 32);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_flush(engine));
    CHECK(tier(engine, NS_LLM_KV_TIER_DISK).is_there == 0 && tier(engine, NS_LLM_KV_TIER_HOST).is_there == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    model = argv[1], folder = argv[2];
    CHECK(access(folder, F_OK) != 0);
    kv_outlives_its_engine();
    cleared_kv_is_gone();
    a_flush_says_what_was_not_stored();
    engines_without_tiers_say_so();
    return 0;
}
