"""What a request counts, by outputs as vLLM gives them."""

from types import SimpleNamespace

from shardes.rollout.engines.vllm.requests import Request, RequestLoop


def test_tokens_of_prompts_are_counted_once_without_those_of_the_cache():
    config = SimpleNamespace(get_vocab_size=lambda: 9, max_model_len=99)
    outputs = []
    engine = SimpleNamespace(model_config=config, step=lambda: outputs.pop(0))
    loop = RequestLoop(SimpleNamespace(llm_engine=engine), timeout_seconds=60)

    def output(name, tokens, *, cached, finished):
        completion = SimpleNamespace(token_ids=tokens)
        return SimpleNamespace(
            request_id=name,
            outputs=[completion],
            finished=finished,
            prompt_logprobs=None,
            num_cached_tokens=cached,
        )

    requests = {"1": Request(num_unread=40), "2": Request(num_unread=7)}
    loop._in_flight |= requests
    loop._ids |= {"1": "1", "2": "2"}
    outputs += [
        [output("1", [5], cached=32, finished=False)],
        [output("1", [6], cached=32, finished=True), output("2", [4], cached=None, finished=True)],
    ]
    loop.finish(list(requests.values()))
    assert loop.num_prefilled_tokens == 8 + 7
    assert [request.tokens for request in requests.values()] == [[5, 6], [4]]
