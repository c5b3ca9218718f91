"""The study of the claims: which runs it makes, what both methods are asked, and what it says of lines."""

import json
import math
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardes.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def claims():
    """Makes ``tools/claims`` importable as the package that it is when it runs."""
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


def line(task, arm, size, seed, rewards, *, kl=0.1, cost=1.0, definition=None):
    """A line of a run whose points are 100 answers apart."""
    from claims import arms

    curve = [
        {
            "step": i,
            "num_completions": 100 * i,
            "num_tokens": 500 * i,
            "core_seconds": cost * i,
            "reward": reward,
            "sampled_reward": reward,
            "length": 5.0,
            "kl": kl * i,
            "kl_of_base": kl * i,
            "seconds": 0.5,
        }
        for i, reward in enumerate(rewards)
    ]
    return {
        "task": task,
        "arm": arm,
        "step_size": size,
        "seed": seed,
        "definition": definition or arms.definition(task, arm),
        "curve": curve,
        "peak_bytes": 700 * 2**20,
        "imported_bytes": 500 * 2**20,
    }


def play(reward_of, task="addition", arm="es"):
    """Make every missing run of an arm, earning what a function of the step size says; return the lines."""
    from claims.runs import missing

    lines = []
    while found := list(missing(lines, [task], [arm])):
        task_name, name, size, seed = found[0]
        lines.append(line(task_name, name, size, seed, [0.1, reward_of(size)]))
    return lines


def peaked_at(best):
    return lambda size: -abs(math.log(size / best))


@pytest.mark.parametrize(("arm", "num_seeds"), [("es", 10), ("grpo", 5)])
def test_a_sweep_is_extended_until_its_best_lies_between_two_that_are_worse(arm, num_seeds):
    from claims.arms import step_size
    from claims.figures import Results

    for place in (-2, 0, 1, 3, 5):
        best = step_size("addition", arm, place)
        lines = play(peaked_at(best), arm=arm)
        sizes = [each["step_size"] for each in lines if each["seed"] == 100]
        low, high = min(0, place - 1), max(3, place + 1)
        assert sorted(sizes) == [step_size("addition", arm, each) for each in range(low, high + 1)]
        assert {(each["step_size"], each["seed"]) for each in lines if each["seed"] != 100} == {
            (best, seed) for seed in range(1, num_seeds + 1)
        }
        assert Results(lines).best("addition", arm) == best


def test_a_sweep_without_an_end_ends():
    from claims.arms import MAX_EXTENSIONS

    lines = play(lambda size: size)
    assert len([each for each in lines if each["seed"] == 100]) == 4 + MAX_EXTENSIONS


def test_the_mean_of_two_tuning_seeds_decides():
    from claims.arms import step_size
    from claims.figures import Results
    from claims.runs import missing

    task, sizes = "receipts-640", [step_size("receipts-640", "es", place) for place in range(3)]
    assert [*missing([], [task], ["es"])] == [
        (task, "es", size, seed) for size in sizes for seed in (100, 101)
    ]
    # The last one is the best of the first seed, and the second one of both.
    earned = {100: [0.3, 0.6, 0.9], 101: [0.3, 0.8, 0.2]}
    lines = [
        line(task, "es", size, seed, [0.1, reward])
        for seed, rewards in earned.items()
        for size, reward in zip(sizes, rewards, strict=True)
    ]
    assert [each[2:] for each in missing(lines[:-1], [task], ["es"])] == [(sizes[2], 101)]
    assert [*missing(lines, [task], ["es"])] == [(task, "es", sizes[1], seed) for seed in range(1, 6)]
    results = Results([*lines, line(task, "es", sizes[1], 1, [0.1, 0.5])])
    assert results.sweep(task, "es") == pytest.approx(dict(zip(sizes, [0.3, 0.7, 0.55], strict=True)))
    assert results.final(task, "es") == {1: 0.5}


def test_keys_and_share_of_answers_may_differ_by_task():
    from claims.arms import definition

    toy, real = definition("addition", "es, racing"), definition("receipts-640", "es, racing")
    assert (
        toy["options"]["rollout.micro_batch_size"] == 16 and real["options"]["rollout.micro_batch_size"] == 2
    )
    assert toy["options"]["es.racing"] == real["options"]["es.racing"] == {"rounds": 4, "keep": 0.5}
    assert toy["answers"] == real["answers"] == 0.46875
    assert definition("addition", "es, screening")["answers"] == 0.98
    assert "answers" not in definition("receipts-640", "es, screening")


def test_an_arm_without_a_sweep_waits_for_that_of_another():
    from claims.arms import step_size
    from claims.runs import missing

    arm, best = "grpo, KL penalty 0.1", step_size("conciseness", "grpo", 1)
    assert list(missing([], ["conciseness"], [arm])) == []
    lines = play(peaked_at(best), task="conciseness", arm="grpo")
    assert list(missing(lines, ["conciseness"], [arm])) == [
        ("conciseness", arm, best, seed) for seed in (1, 2)
    ]


def test_lines_of_an_arm_that_has_changed_do_not_count():
    from claims.runs import current

    good = line("addition", "es", 0.02, 1, [0.1, 0.5])
    other = line("addition", "es", 0.02, 2, [0.1, 0.5], definition={"method": "es"})
    of_nobody = good | {"arm": "an arm that was"}
    assert current([good, other, of_nobody]) == [good]


def test_half_a_line_does_not_swallow_the_next(tmp_path):
    from claims.lines import append_line, read_lines

    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as stream:
        stream.write('{"a": 2')
    append_line(path, {"a": 3})
    append_line(path, {"a": 4})
    assert read_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_evaluations_are_spread_over_all_steps():
    from claims.training import due_steps

    assert due_steps(20, 10) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert due_steps(12, 10)[-1] == 12 and len(due_steps(12, 10)) == 10
    assert due_steps(3, 10) == [1, 2, 3]


def test_answers_of_a_bundle_share_the_mean_of_their_rewards():
    from claims.judging import bundled

    # Four prompts with three answers each, in bundles of two prompts.
    rewards = [0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 1.0, 1.0, 1.0, 3.0, 5.0, 7.0]
    assert bundled(rewards, num_generations=3, bundle=2) == [2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4]
    assert bundled(rewards, num_generations=3, bundle=1) == rewards


def test_divergence_weighs_tokens_and_not_answers():
    from claims.measuring import divergence

    pairs = [[[1], [2, 3]], [[1], [4]]]
    assert divergence(pairs, [-1.0, -2.0], [-1.5, -5.0]) == pytest.approx((2 * 0.5 + 3.0) / 3)
    assert divergence(pairs, [-1.0, -2.0], [-1.0, float("nan")]) is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prompts_per_step": 5000}, "--prompts-per-step"),
        ({"prompts_per_step": 6, "bundle": 4}, "--bundle"),
        ({"prompts_per_step": 100}, "--completions"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, key):
    from claims.settings import GRPOSettings

    with pytest.raises(UserError, match=key):
        GRPOSettings(0.001, **changes).check(1600, num_completions=512)


def test_a_backward_pass_divides_an_update():
    from claims.settings import GRPOSettings

    settings = GRPOSettings(0.001, num_generations=8, prompts_per_step=12, micro_batch_size=40)
    assert settings.completions_per_step == 96
    assert settings.backward_size == 32


def results_of_both():
    """Lines of two arms: es is better on all seeds, equally far from the base, and slower."""
    from claims.figures import Results

    lines = []
    for arm, gain, cost in (("es", 0.9, 2.0), ("grpo", 0.6, 1.0)):
        lines += play(peaked_at(0.002 * 10**0.5 if arm == "es" else 3.2e-4), arm=arm)
        lines = [each for each in lines if each["seed"] == 100 or each["arm"] != arm]
        best = Results(lines).best("addition", arm)
        for seed in (1, 2, 3, 4, 5):
            final = gain + 0.01 * seed
            lines.append(line("addition", arm, best, seed, [0.1, final / 2, final], cost=cost, kl=seed / 50))
    return Results(lines)


def test_an_arm_with_a_step_of_its_own_has_no_sweep():
    from claims.runs import missing

    arm = "es, 2 problems, GRPO's time"
    assert [*missing([], ["receipts"], [arm])] == [("receipts", arm, 0.007, seed) for seed in (1, 2)]


def test_tables_say_what_lines_say():
    from claims import tables

    text = tables.page(results_of_both(), ["claims-curves.png"])
    rows = {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in text.splitlines()}
    by_claim = {row[0]: row for row in rows if len(row) == 4}
    assert by_claim["ES earns more at equal answers"][1:] == ("addition", "+0.300 ± 0.000", "confirmed")
    # In 2 core-seconds grpo has all of its gain, and es half of its: .465 against .63 on the average.
    assert by_claim["ES earns more in equal time (2 core-seconds)"][2:] == ("-0.165 ± 0.010", "the opposite")
    assert by_claim["Runs of ES differ less"][3] == "not told apart"
    assert by_claim["ES stays nearer to the base model"][2:] == ("KL +0.000 ± 0.000", "not told apart")
    # t(4) s / sqrt(5) = 2.776 * .0158 / 2.236
    grpo = ("grpo", "0.00032", "24576", "0.630 ± 0.020", "0.016", "-0.300 ± 0.000")
    assert grpo in {row[:6] for row in rows}
    assert "![claims-curves](claims-curves.png)" in text


def test_half_of_the_tokens_is_compared_with_the_end_of_plain_es():
    from claims.figures import Results

    results = results_of_both()
    # Points are 500 tokens apart, and es has 1000: .9 + .01 * seed. Then grpo had half of .6 + .01 * seed.
    found = results.difference_at_half("addition", "grpo", "es")
    assert found.value == pytest.approx(0.5 * 0.63 - 0.93) and found.num_values == 5
    assert results.difference_at_half("addition", "es", "es").value == pytest.approx(-0.5 * 0.93)
    # A run that ends there is compared at its end.
    half = "es, small steps, half"
    lines = [line("addition", half, 0.004, 100, [0.1, 0.2]), line("addition", half, 0.004, 1, [0.1, 0.5])]
    lines += [line("addition", half, size, 100, [0.1, 0.1]) for size in (0.0013, 0.013, 0.04)]
    found = Results([*results.lines, *lines]).difference_at_half("addition", half, "es")
    assert (found.value, found.num_values) == (pytest.approx(0.5 - 0.91), 1)


def test_claims_compare_runs_of_the_seeds_that_both_have():
    from claims import tables
    from claims.figures import Results

    lines = results_of_both().lines
    best = Results(lines).best("addition", "es")
    more = [line("addition", "es", best, seed, [0.1, 9.0, 9.0], kl=9.0) for seed in (6, 7)]
    assert tables.claims(Results([*lines, *more])) == tables.claims(Results(lines))
    assert Results([*lines, *more]).final("addition", "es")[7] == 9.0


def test_an_arm_with_half_of_the_answers_is_compared_at_its_end():
    from claims import arms, tables
    from claims.figures import Results

    half = "es, small steps, half"
    assert arms.definition("addition", half)["num_completions"] == 12288
    lines = results_of_both().lines + play(peaked_at(arms.step_size("addition", half, 2)), arm=half)
    rows = [row.split(" | ") for row in tables.rewards(Results(lines)) if row.startswith("| ")]
    # Two points of 500 tokens each are what the others have spent, and not the one of this arm.
    assert rows[0][-3] == "after 1000 tokens"
    assert [row[2] for row in rows] == ["answers", "24576", "24576", "12288"]
    assert rows[-1][0] == f"| {half}" and rows[-1][3] == rows[-1][-3] == "0.000 ± 0.000"


def test_answers_are_scored_as_by_all_logits():
    import torch
    from claims.grpo import answer_likelihoods
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "configs" / "quickstart" / "model").eval()
    ids = torch.randint(4, 20, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, -2:] = 0
    found, entropies = answer_likelihoods(model, ids, mask, num_tokens=5, temperature=0.7)
    with torch.no_grad():
        scores = (model(input_ids=ids, attention_mask=mask).logits / 0.7).log_softmax(-1)
    for row in range(3):
        for place in range(5):
            of_token = scores[row, 6 + place]
            assert found[row, place].item() == pytest.approx(of_token[ids[row, 7 + place]].item(), abs=1e-5)
            expected = -(of_token.exp() * of_token).sum().item()
            assert entropies[row, place].item() == pytest.approx(expected, abs=1e-5)
    found.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_page_keeps_what_is_written_by_hand(tmp_path):
    from claims import cli

    pytest.importorskip("matplotlib")
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    lines.write_text("".join(json.dumps(each) + "\n" for each in results_of_both().lines))
    page.write_text(f"# Title\n\nBefore.\n\n{cli.BEGIN}\nformer figures\n{cli.END}\n\nAfter.\n")
    for _ in range(2):
        result = CliRunner().invoke(cli.main, ["table", "--lines", str(lines), "--page", str(page)])
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert text.startswith("# Title\n\nBefore.\n\n") and text.endswith(f"{cli.END}\n\nAfter.\n")
        assert "| es |" in text and "former figures" not in text
    for name in ("curves", "steps", "kl"):
        assert (tmp_path / f"page-{name}.png").read_bytes()[1:4] == b"PNG"


def test_a_task_that_is_not_known_is_named():
    from claims import cli

    result = CliRunner().invoke(cli.main, ["run", "--tasks", "chess"])
    assert result.exit_code == 2 and "chess" in result.output and "quickstart" in result.output


def small(tmp_path, *more):
    """Overrides that make the quickstart a matter of a second."""
    return [f"run.dir={tmp_path / 'run'}", "es.population=4", "task.batch_size=8", *more]


def test_places_of_es_are_measured_as_the_run_itself_does(tmp_path, monkeypatch):
    from claims.es import es_config, train_es
    from claims.measuring import measure

    monkeypatch.chdir(ROOT)
    path = Path("configs/quickstart.yaml")
    config = es_config(path, small(tmp_path), num_completions=100)
    assert config.es.iterations == 3
    config = es_config(path, small(tmp_path, "eval.every=1"), num_completions=100)
    trained = train_es(config, num_evaluations=3)
    assert [place.num_completions for place in trained.places] == [32, 64, 96]
    seconds = [place.core_seconds for place in trained.places]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]
    curve = measure(config, trained, kl_prompts=4)
    metrics = [json.loads(each) for each in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [point["reward"] for point in curve] == [each["heldout_reward"] for each in metrics]
    assert [point["num_tokens"] for point in curve[1:]] == [
        sum(each["num_tokens"] for each in metrics[: i + 1]) for i in range(3)
    ]
    assert curve[0]["kl"] == 0 and curve[-1]["kl"] != 0


def test_grpo_is_asked_and_rewarded_like_es(tmp_path, monkeypatch):
    from claims.arms import TASKS
    from claims.judging import make_judge
    from claims.measuring import one_process
    from claims.settings import GRPOSettings

    from shardes.rollout.encoding import Question
    from shardes.rollout.preparing import prepare_tasks
    from shardes.tasks.loading import load_task

    monkeypatch.chdir(ROOT)
    overrides = [f"{key}={json.dumps(value)}" for key, value in TASKS["addition"].overrides.items()]
    config = one_process(Path("configs/quickstart.yaml"), overrides)
    judge = make_judge(config, GRPOSettings(0.001))
    task = load_task(config.task)
    encoder = prepare_tasks(config, task).encoder
    wanted = [list(encoder.encode(Question.of(task, task.train[row])).prompts[0]) for row in (5, 0)]
    assert judge.prompt_ids(["5", "0"]) == wanted
    # A right sum with its end, one that was cut, and one of which a digit is right.
    right = encoder.text_tokens(task.train[5]["sum"])
    assert len(right) == 3
    answers = [[*right, *judge.end_ids], right, [right[0], judge.end_ids[0]]]
    assert judge(["5"] * 3, answers) == pytest.approx([1.1, 1.1, 0.1 / 3])
    assert (judge.num_completions, judge.num_tokens) == (3, 4 + 3 + 2)
    bundles = make_judge(config, GRPOSettings(0.001, num_generations=1, bundle=3))
    assert bundles(["5"] * 3, answers) == pytest.approx([(2.2 + 0.1 / 3) / 3] * 3)


def test_grpo_trains_and_its_checkpoints_are_models(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from claims.grpo import train_grpo
    from claims.measuring import measure, one_process
    from claims.settings import GRPOSettings

    monkeypatch.chdir(ROOT)
    config = one_process(Path("configs/quickstart.yaml"), ["es.seed=3"])
    settings = GRPOSettings(0.003, num_generations=4, prompts_per_step=8)
    trained = train_grpo(config, settings, out=tmp_path / "out", num_completions=70, num_evaluations=2)
    assert [(place.step, place.num_completions) for place in trained.places] == [(1, 32), (2, 64)]
    curve = measure(config, trained, kl_prompts=4)
    assert curve[1]["kl_of_base"] != 0 and curve[2]["kl_of_base"] != curve[1]["kl_of_base"]
    # The base model's own files, and other weights.
    base, last = ROOT / "configs/quickstart/model", tmp_path / "out" / "step-00002"
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (last / name).read_bytes() == (base / name).read_bytes()
    assert (last / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
