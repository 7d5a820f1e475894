"""The sampler's tables are found in a model runner that has them, and replaced where they are."""

from types import SimpleNamespace

from restore_agent.workload.vllm.sampler_tables import move, tables


def test_each_table_is_replaced_by_what_is_made_of_it() -> None:
    state = SimpleNamespace(output_bin_counts="counts", prompt_bin_mask="mask", repetition_penalty="small")
    runner = SimpleNamespace(sampler=SimpleNamespace(penalties_state=state))
    assert tables(runner) == ["counts", "mask"]
    move(runner, str.upper)
    assert vars(state) == {"output_bin_counts": "COUNTS", "prompt_bin_mask": "MASK", "repetition_penalty": "small"}


def test_a_runner_without_them_has_none() -> None:
    runners = (SimpleNamespace(), SimpleNamespace(sampler=None), SimpleNamespace(sampler=SimpleNamespace(top_k=1)))
    for runner in runners:
        before = vars(runner).copy()
        assert tables(runner) == []
        move(runner, str.upper)
        assert vars(runner) == before
