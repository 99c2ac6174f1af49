
static void tell_story(heard *h) {
    ns_llm_request request = 0;
    ns_llm_request_params params = story(4);
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(live_engine, &params, listen, h, &request));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(request, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(request));
    freed_request = request;
}

/* Handles are refused in the child, not waited for: the threads behind them stayed with the parent. */
static int fork_and_refuse(void) {
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        refuse_in_child();
        /* Another program in the end, so that no tool counts what this copy of the parent leaves behind. */
        execlp("true", "true", (char *)NULL);
        _exit(1);
    }
    int how = 0;
    CHECK(waitpid(child, &how, 0) == child);
    CHECK(WIFEXITED(how) && WEXITSTATUS(how) == 0);
    return 1;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    model = argv[1];
    static heard before, after;
    freed_engine = open_engine(model);
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(freed_engine));
    live_engine = open_engine(model);
    tell_story(&before);
    ns_llm_request_params params = story(4);
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(live_engine, &params, hear_nothing, NULL, &live_called));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_wait(live_called, NS_LLM_FOREVER, NULL));
    CHECK_STATUS(NS_LLM_OK, ns_llm_generate(live_engine, &params, NULL, NULL, &live_fetched));

    try_every_function();
    int num_children = fork_and_refuse();

    tell_story(&after);
    CHECK(before.text_size == after.text_size && memcmp(before.text, after.text, before.text_size) == 0);
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(live_called));
    CHECK_STATUS(NS_LLM_OK, ns_llm_request_free(live_fetched));
    CHECK_STATUS(NS_LLM_OK, ns_llm_engine_free(live_engine));
    printf("%d calls, %d child\n", num_tried, num_children);
    return 0;
}
