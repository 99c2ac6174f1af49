/* Embeddings: all at once into a buffer, one by one as events, with every option; what does not fit or makes no sense is
 * refused before anything is computed.
 * Arguments: the model's folder, and "short" where the machine is too slow for an input of full length. */
#include "check.h"

#include <math.h>

static ns_llm_engine engine;
static size_t dimensions;

static ns_llm_embedding_input inputs[] = {{.text = TEXT("a red fox")}, {.text = TEXT("a quick fox")}};

static ns_llm_embedding_params both(void) {
    ns_llm_embedding_params params = {.struct_size = sizeof params, .inputs = inputs, .num_inputs = 2};
    return params;
}

static double length(const float *vector, size_t num) {
    double sum = 0;
    for (size_t i = 0; i < num; i++)
        sum += (double)vector[i] * vector[i];
    return sqrt(sum);
}

static float *whole, *fetched;

static void all_at_once(void) {
    size_t num = 7;
    ns_llm_embedding_params params = both();
    ns_llm_summary summary = {.struct_size = sizeof summary};
    CHECK_STATUS(NS_LLM_BUFFER_TOO_SMALL, ns_llm_embed(engine, &params, NULL, 0, &num, NULL));
    CHECK(num == 2 * dimensions);
    CHECK_STATUS(NS_LLM_OK, ns_llm_embed(engine, &params, whole, num, &num, &summary));
    CHECK(num == 2 * dimensions && summary.prompt_tokens > 2 && summary.completion_tokens == 0);
    for (size_t row = 0; row < 2; row++)
        CHECK(fabs(length(whole + row * dimensions, dimensions) - 1) < 1e-4);
    CHECK(memcmp(whole, whole + dimensions, dimensions * sizeof *whole) != 0);
}

/* Bit for bit the same vectors, fetched and by callback, from tokens in place of text too. */
static void one_by_one(void) {
    uint32_t ids[32];
    size_t num_ids = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_tokenize(engine, inputs[1].text.data, inputs[1].text.size,
                                            NS_LLM_TOKENIZE_ADD_SPECIAL, ids, 32, &num_ids));
    ns_llm_embedding_input mixed[] = {inputs[0], {.token_ids = ids, .num_token_ids = num_ids}};
    ns_llm_embedding_params params = both();
    params.inputs = mixed;
    ns_llm_request request = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_submit_embedding(engine, &params, NULL, NULL, &request));
    ns_llm_event event = {.struct_size = sizeof event};
    int num_vectors = 0, num_done = 0;
    while (ns_llm_request_next(request, NS_LLM_FOREVER, &event) == NS_LLM_OK) {
        if (event.kind == NS_LLM_EVENT_EMBEDDING) {
            CHECK(event.input < 2 && event.num_dimensions == dimensions && event.is_truncated == 0);
            CHECK(event.input == 0 || event.num_input_tokens == num_ids);
            memcpy(fetched + event.input * dimensions, event.embedding, dimensions * sizeof *fetched);
            num_vectors++;
        }
        num_done += event.kind == NS_LLM_EVENT_DONE && event.summary->prompt_tokens > num_ids;
    }
    CHECK(num_vectors == 2 && num_done == 1);
    CHECK(memcmp(whole, fetched, 2 * dimensions * sizeof *whole) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));

    static heard h;
    CHECK_STATUS(NS_LLM_OK, ns_llm_submit_embedding(engine, &params, listen, &h, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    CHECK(h.num_vectors == 2 && h.num_last == 1);
}

static void options_are_obeyed(void) {
    size_t num = 0;
    ns_llm_embedding_params params = both();
    params.dimensions = 8;
    params.priority = NS_LLM_PRIORITY_HIGH;
    params.timeout_ms = 600000;
    CHECK_STATUS(NS_LLM_OK, ns_llm_embed(engine, &params, fetched, 2 * dimensions, &num, NULL));
    CHECK(num == 16 && fabs(length(fetched, 8) - 1) < 1e-4);
    params.dimensions = 0;
    params.flags = NS_LLM_EMBEDDING_NO_NORMALIZE;
    CHECK_STATUS(NS_LLM_OK, ns_llm_embed(engine, &params, fetched, 2 * dimensions, &num, NULL));
    CHECK(fabs(length(fetched, dimensions) - 1) > 1e-4);
}

/* Longer than the model takes: cut and said so, or refused, as the caller wants. */
static void long_inputs_are_cut(void) {
    size_t num = 7;
    static char words[40000];
    for (size_t i = 0; i < sizeof words; i++)
        words[i] = "fox "[i % 4];
    ns_llm_embedding_input large = {.text = {words, sizeof words}};
    ns_llm_embedding_params params = both();
    params.inputs = &large, params.num_inputs = 1;
    ns_llm_request request = 0;
    CHECK_STATUS(NS_LLM_OK, ns_llm_submit_embedding(engine, &params, NULL, NULL, &request));
    ns_llm_event event = {.struct_size = sizeof event};
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_next(request, NS_LLM_FOREVER, &event));
    CHECK(event.kind == NS_LLM_EVENT_EMBEDDING && event.is_truncated == 1);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    params.flags = NS_LLM_EMBEDDING_NO_TRUNCATE;
    CHECK_STATUS(NS_LLM_PROMPT_TOO_LONG, ns_llm_embed(engine, &params, fetched, dimensions, &num, NULL));
    CHECK(num == 0);
}

static void nonsense_is_refused(void) {
    size_t num = 7;
    ns_llm_request request = 7;
    uint32_t ids[] = {1};
    ns_llm_embedding_input neither = {.num_token_ids = 0}, two = {.text = TEXT("x"), .token_ids = ids},
                           bad = {.text = TEXT("\xff")};
    ns_llm_embedding_params params;
#define REFUSED(expected, change)                                                                                      \
    do {                                                                                                               \
        params = both();                                                                                               \
        change;                                                                                                        \
        CHECK_STATUS(expected, ns_llm_embed(engine, &params, whole, 2 * dimensions, &num, NULL));                      \
        CHECK_STATUS(expected, ns_llm_submit_embedding(engine, &params, NULL, NULL, &request));                        \
        CHECK(num == 0 && request == 0);                                                                               \
    } while (0)
    REFUSED(NS_LLM_INVALID_ARGUMENT, params.num_inputs = 0);
    REFUSED(NS_LLM_INVALID_ARGUMENT, params.num_inputs = 2049);
    REFUSED(NS_LLM_NULL_ARGUMENT, (params.inputs = &neither, params.num_inputs = 1));
    REFUSED(NS_LLM_INVALID_ARGUMENT, (params.inputs = &two, params.num_inputs = 1));
    REFUSED(NS_LLM_INVALID_UTF8, (params.inputs = &bad, params.num_inputs = 1));
    REFUSED(NS_LLM_INVALID_ARGUMENT, params.priority = 9);
    REFUSED(NS_LLM_INVALID_ARGUMENT, params.timeout_ms = UINT64_MAX);
    REFUSED(NS_LLM_UNSUPPORTED, params.flags = 4);
#undef REFUSED
    params = both();
    params.dimensions = dimensions + 1;
    CHECK_STATUS(NS_LLM_INVALID_ARGUMENT, ns_llm_submit_embedding(engine, &params, NULL, NULL, &request));
}

int main(int argc, char **argv) {
    CHECK(argc == 2 || argc == 3);
    engine = open_engine(argv[1]);
    ns_llm_model_info info = {.struct_size = sizeof info};
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_info(engine, &info));
    dimensions = info.embedding_dimensions;
    CHECK(dimensions > 8);
    whole = calloc(2 * dimensions, sizeof *whole), fetched = calloc(2 * dimensions, sizeof *fetched);
    CHECK(whole != NULL && fetched != NULL);
    all_at_once();
    one_by_one();
    options_are_obeyed();
    if (argc == 2)
        long_inputs_are_cut();
    nonsense_is_refused();
    free(whole), free(fetched);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(engine));
    return 0;
}
