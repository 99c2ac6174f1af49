// A conversation, in C++17: reads what you say from standard input, a line a turn, and answers with all that was said in
// mind. The handles are freed by destructors, which may run in any order.
//
//   c++ -std=c++17 chat.cpp $(pkg-config --cflags --libs ns_llm) -o chat
//   echo "What is the capital of France?" | ./chat models/demo
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ns_llm.h>

namespace {

ns_llm_text view(std::string_view text) { return {text.data(), text.size()}; }

/// Turns a status into an exception. Exceptions must not leave callbacks; this program has none.
void check(ns_llm_status status) {
    if (status != NS_LLM_OK)
        throw std::runtime_error(std::string(ns_llm_status_name(status)) + ": " + ns_llm_last_error(nullptr));
}

/// Owns a handle.
template <ns_llm_status (*release)(std::uint64_t)> class Handle {
  public:
    Handle() = default;
    Handle(const Handle &) = delete;
    Handle &operator=(const Handle &) = delete;
    ~Handle() { release(id); }
    std::uint64_t id = 0;
};

using Engine = Handle<ns_llm_engine_free>;
using Request = Handle<ns_llm_request_free>;

/// One turn: its role, and what was said.
using Turn = std::pair<std::string, std::string>;

/// Answers a conversation; prints the answer as it comes, and returns it.
std::string answer(const Engine &engine, const std::vector<Turn> &conversation) {
    std::vector<ns_llm_message> messages;
    for (const auto &[role, content] : conversation)
        messages.push_back({view(role), view(content)});
    ns_llm_request_params params{};
    params.struct_size = sizeof params;
    params.messages = messages.data();
    params.num_messages = messages.size();
    params.set = NS_LLM_SET_TEMPERATURE;
    Request request;
    check(ns_llm_generate(engine.id, &params, nullptr, nullptr, &request.id));

    std::string text;
    ns_llm_event event{};
    event.struct_size = sizeof event;
    ns_llm_status status;
    while ((status = ns_llm_request_next(request.id, NS_LLM_FOREVER, &event)) == NS_LLM_OK) {
        const std::string_view said(event.text.data, event.text.size);
        if (event.kind == NS_LLM_EVENT_FAILED)
            throw std::runtime_error(std::string(said));
        if (event.kind == NS_LLM_EVENT_DELTA) {
            std::cout << said << std::flush;
            text += said;
        }
    }
    if (status != NS_LLM_ENDED)
        check(status);
    return text;
}

int chat(std::string_view model) {
    Engine engine;
    ns_llm_engine_params params{};
    params.struct_size = sizeof params;
    params.model = view(model);
    check(ns_llm_engine_open(&params, &engine.id));

    std::vector<Turn> conversation;
    for (std::string line; std::getline(std::cin, line);) {
        conversation.emplace_back("user", line);
        conversation.emplace_back("assistant", answer(engine, conversation));
        std::cout << std::endl;
    }
    return EXIT_SUCCESS;
}

} // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::cerr << "usage: " << argv[0] << " MODEL\n";
        return EXIT_FAILURE;
    }
    try {
        return chat(argv[1]);
    } catch (const std::exception &error) {
        std::cerr << error.what() << '\n';
        return EXIT_FAILURE;
    }
}
