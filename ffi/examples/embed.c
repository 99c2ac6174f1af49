/* Compares texts by meaning: turns each into a vector of length 1, and prints the dot product of every pair, which is 1
 * for equal texts.
 *
 *   cc -std=c11 embed.c $(pkg-config --cflags --libs ns_llm) -o embed
 *   ./embed models/demo "a red fox" "a quick fox" "the capital of France" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <ns_llm.h>

static int fail(const char *what, ns_llm_status status) {
    fprintf(stderr, "%s: %s: %s\n", what, ns_llm_status_name(status), ns_llm_last_error(NULL));
    return EXIT_FAILURE;
}

static float dot(const float *a, const float *b, size_t num) {
    float sum = 0;
    for (size_t i = 0; i < num; i++)
        sum += a[i] * b[i];
    return sum;
}

static int compare(ns_llm_engine engine, char **texts, size_t num_texts) {
    ns_llm_embedding_input inputs[64] = {0};
    for (size_t i = 0; i < num_texts; i++)
        inputs[i].text = (ns_llm_text){texts[i], strlen(texts[i])};
    ns_llm_embedding_params params = {.struct_size = sizeof params, .inputs = inputs, .num_inputs = num_texts};

    /* Asked without a buffer, the size; nothing is computed yet. */
    size_t num_floats = 0;
    ns_llm_status status = ns_llm_embed(engine, &params, NULL, 0, &num_floats, NULL);
    if (status != NS_LLM_BUFFER_TOO_SMALL)
        return fail("embed", status);
    float *vectors = malloc(num_floats * sizeof *vectors);
    if (vectors == NULL)
        return EXIT_FAILURE;
    ns_llm_summary summary = {.struct_size = sizeof summary};
    status = ns_llm_embed(engine, &params, vectors, num_floats, &num_floats, &summary);
    if (status != NS_LLM_OK) {
        free(vectors);
        return fail("embed", status);
    }
    size_t dimensions = num_floats / num_texts;
    for (size_t i = 0; i < num_texts; i++) {
        for (size_t j = 0; j < num_texts; j++)
            printf("%7.3f", (double)dot(vectors + i * dimensions, vectors + j * dimensions, dimensions));
        printf("   %s\n", texts[i]);
    }
    fprintf(stderr, "%llu tokens, %zu dimensions, %.1f ms\n", (unsigned long long)summary.prompt_tokens, dimensions,
            summary.total_ms);
    free(vectors);
    return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
    if (argc < 3 || argc > 66) {
        fprintf(stderr, "usage: %s MODEL TEXT..\n", argv[0]);
        return EXIT_FAILURE;
    }
    ns_llm_engine engine;
    ns_llm_engine_params where = {.struct_size = sizeof where, .model = {argv[1], strlen(argv[1])}};
    ns_llm_status status = ns_llm_engine_open(&where, &engine);
    if (status != NS_LLM_OK)
        return fail("open", status);
    int code = compare(engine, argv + 2, (size_t)argc - 2);
    ns_llm_engine_free(engine);
    return code;
}
