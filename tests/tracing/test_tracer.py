import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import timerome as tr
from tests.tiny import decoded_facts, planted, tiny_dream, tiny_facts, tiny_llada
from tests.tracing import naive
from timerome.diffusion import SamplerConfig, encode
from timerome.facts import Fact, FactError
from timerome.hooks import Hooks
from timerome.tracing import CheckpointError
from timerome.tracing.corrupted_inputs import corrupted_inputs
from timerome.tracing.one_fact import OneFact
from timerome.tracing.runs import FactRuns, Restoration

LAYOUTS = pytest.mark.parametrize("make", [tiny_llada, tiny_dream])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def hooks_on(backbone):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())


def same(a, b):
    """Whether two traces hold the same numbers, bit for bit."""

    def arrays(t):
        found = {f"{score}/{name}": x for score, measured in t.measured.items() for name, x in measured.items()}
        return {**found, "recalled": t.recalled, "permuted": t.permuted}

    one, other = arrays(a), arrays(b)
    return (a.facts, a.not_traceable, sorted(one)) == (b.facts, b.not_traceable, sorted(other)) and all(
        np.array_equal(one[n], other[n], equal_nan=one[n].dtype.kind == "f") for n in one
    )


# Runs ----------------------------------------------------------------------------------------------------------------


def runs_of(backbone, corruption="noise", window="from", n=4, **options):
    fact = decoded_facts(backbone)[1]
    sequence = encode(backbone, fact)
    given = corrupted_inputs(backbone, [sequence], corruption, noise_scale=3.0, draws=2, seed=0)[0]
    config = tr.TraceConfig(sampler=SamplerConfig(steps=n), window=window)
    return FactRuns(backbone, sequence, 3, config, **options), given


@LAYOUTS
@pytest.mark.parametrize("corruption", ["noise", "mask"])
@torch.no_grad()
def test_restoring_the_last_block_everywhere_is_the_clean_run(make, corruption):
    backbone = make()
    backbone.model.double()  # where rounding is no excuse
    runs, given = runs_of(backbone, corruption)
    last = tr.Site(backbone.n_layers - 1)
    clean = runs.clean([last])
    everywhere = Restoration((last,), "object", 0, positions=torch.ones(len(runs.sequence.ids), dtype=torch.bool))
    restored = runs.corrupted(clean, given, [(0, everywhere), (0, None)])
    np.testing.assert_array_equal(restored.masked[:1], clean.scores.masked)
    np.testing.assert_allclose(restored.log_prob[:1], clean.scores.log_prob, atol=1e-12)
    assert np.abs(restored.carried().log_prob[1] - clean.scores.carried().log_prob[0]).max() > 0.01


@LAYOUTS
@torch.no_grad()
def test_restoring_nothing_is_the_corrupted_run(make):
    backbone = make()
    backbone.model.double()
    runs, given = runs_of(backbone)
    clean = runs.clean([tr.Site(1)])
    nowhere = Restoration((tr.Site(1),), "object", 0, positions=torch.zeros(len(runs.sequence.ids), dtype=torch.bool))
    scores = runs.corrupted(clean, given, [(1, nowhere), (1, None)])
    np.testing.assert_allclose(scores.log_prob[0], scores.log_prob[1], atol=1e-12)
    np.testing.assert_array_equal(scores.masked[0], scores.masked[1])


@LAYOUTS
def test_restoring_the_object_in_the_last_block_recovers_everything(make):
    """What predicts the object is all there, on a shifted model one position to the left."""
    backbone = make()
    trace = tr.CausalTracer(backbone, tr.TraceConfig(sites=[tr.Site(2)], roles=["object"], draws=2)).trace(
        decoded_facts(backbone)
    )
    assert trace.recalled.all()
    for effect in (trace.tie[:, 0, 0, 0], trace.ie[:, 0, 0, 0]):
        assert np.isfinite(effect).sum() >= 2  # elsewhere the noise did no harm at that step
        np.testing.assert_allclose(effect[np.isfinite(effect)], 1.0, atol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("window", ["single", "from", "until"])
@pytest.mark.parametrize("corruption", ["noise", "subject"])
def test_batches_agree_with_one_run_at_a_time(make, window, corruption):
    """In double precision, so that no two tokens are tied by rounding."""
    backbone = make()
    facts = decoded_facts(backbone)
    backbone.model.double()
    sampler = SamplerConfig(steps=3)
    tracer = tr.CausalTracer(
        backbone,
        tr.TraceConfig(
            sites=[tr.Site(0), tr.Site(1, "attn"), tr.Site(2, "mlp")],
            window=window,
            corruption=corruption,
            draws=2,
            sampler=sampler,
            batch_size=5,
            min_total_effect=0.02,
        ),
    )
    trace = tracer.trace(facts)
    sequences = [encode(backbone, fact) for fact in facts]
    inputs = corrupted_inputs(backbone, sequences, corruption, noise_scale=3.0, draws=2, seed=0)
    compared = 0
    for row, which in enumerate([fact.id for fact in facts].index(i) for i in trace.facts[:2]):
        for n, site in enumerate(trace.sites):
            for k, step in enumerate(trace.steps[:-1]):
                for r, role in enumerate(trace.roles):
                    tie, ie = naive.effects(
                        backbone, sequences[which], inputs[which], sampler, window, site, role, step
                    )
                    for (effect, total), found in ((tie, trace.tie), (ie, trace.ie)):
                        wanted = effect / total if total >= 0.02 else np.nan
                        assert found[row, n, k, r] == pytest.approx(wanted, abs=1e-9, nan_ok=True)
                        compared += bool(np.isfinite(wanted))
    assert compared >= 12


@torch.no_grad()
def test_runs_in_one_situation_share_a_forward():
    runs, given = runs_of(tiny_llada(), window="single")
    clean = runs.clean([tr.Site(1)])
    before = runs.forward_rows
    runs.corrupted(clean, given, [(0, None)] * 10)
    assert runs.forward_rows - before == clean.steps


def test_mask_corruption_leaves_the_prompt_masked_and_the_canvas_alone():
    backbone = tiny_llada()
    sequence = encode(backbone, tiny_facts(1)[0])
    (given,) = corrupted_inputs(backbone, [sequence], "mask", noise_scale=3.0, draws=4, seed=0)[0]
    assert (given.ids == backbone.mask_id).tolist() == (sequence.subject | sequence.canvas).tolist()


def test_other_subjects_differ_and_have_the_same_length():
    backbone = tiny_llada()
    sequences = [encode(backbone, fact) for fact in tiny_facts(4)]
    for sequence, given in zip(
        sequences, corrupted_inputs(backbone, sequences, "subject", noise_scale=3.0, draws=5, seed=0), strict=True
    ):
        others = {int(g.ids[sequence.subject]) for g in given}
        assert len(given) == len(others) == 3 and int(sequence.ids[sequence.subject]) not in others


# Planted truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "module"), [(0, "attn"), (1, "attn"), (2, "mlp")])
@pytest.mark.parametrize("corruption", ["mask", "subject"])
def test_the_planted_site_is_found(layer, module, corruption):
    tracer = tr.CausalTracer(
        planted(layer, module),
        tr.TraceConfig(modules=["attn", "mlp"], roles=["object"], corruption=corruption, draws=2),
    )
    trace = tracer.trace(tiny_facts(4))
    assert trace.best() == tr.Coordinate(layer, module, 0, "object")
    np.testing.assert_allclose(trace.at(trace.best()), 1.0, atol=1e-4)
    elsewhere = [n for n, site in enumerate(trace.sites) if site != (layer, module)]
    np.testing.assert_allclose(np.nan_to_num(trace.tie[:, elsewhere]), 0.0, atol=1e-4)


def test_the_planted_path_is_seen_at_every_depth():
    trace = tr.CausalTracer(planted(layer=1), tr.TraceConfig(modules=["block"], corruption="mask")).trace(tiny_facts(3))
    subject, answer = (trace.mean()[:, 0, trace.roles.index(role)] for role in ("subject_last", "object"))
    np.testing.assert_allclose(subject, [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(answer, [0, 1, 1], atol=1e-4)
    assert trace.best() == tr.Coordinate(0, "block", 0, "subject_last")  # ties go to the lower layer


def test_a_token_committed_early_decides_later_steps():
    """Restored at step 0 alone, the answer's first token is right, and the rest follows from it."""
    tracer = tr.CausalTracer(
        planted(),
        tr.TraceConfig(sites=[tr.Site(1, "attn")], roles=["object"], corruption="subject", window="single", draws=2),
    )
    trace = tracer.trace(tiny_facts(4))
    tie = trace.mean()[0, :, 0]
    assert tie[:2] == pytest.approx([1, 2 / 3], abs=1e-4)  # at step 1 the first of three tokens is lost
    assert np.isnan(tie[2])
    assert trace.temporal_gain().low > 0


def test_random_sites_do_less_than_the_planted_one():
    trace = tr.CausalTracer(
        planted(), tr.TraceConfig(modules=["attn", "mlp"], roles=["object"], corruption="mask")
    ).trace(tiny_facts(6))
    summary = trace.summary()
    assert summary["random_site"][0] == pytest.approx(0.0, abs=1e-4)
    assert summary["best_minus_random_site"][1] > 0.9


@LAYOUTS
@torch.no_grad()
def test_a_random_site_restores_as_many_positions_elsewhere(make):
    backbone = make()
    runs, given = runs_of(backbone, n=3)
    clean = runs.clean()
    for step in range(3):
        for role in ("subject_last", "object"):
            one = OneFact(runs, backbone.sites(), given, (0, 1, 2))
            drawn = [one.random_site(runs, clean, draw, step, role) for draw in range(20)]
            own = runs.places(clean.states[0], role) | runs.sequence.subject
            count = int(runs.places(clean.states[step], role).sum())
            assert not any((restoration.positions & own).any() for restoration in drawn)
            assert {int(restoration.positions.sum()) for restoration in drawn} == {count}
            assert len({restoration.sites for restoration in drawn}) > 3


def test_activations_of_permuted_steps_do_less():
    """In the planted model a token can only be predicted once the one before it stands, so earlier steps know less."""
    trace = tr.CausalTracer(
        planted(), tr.TraceConfig(sites=[tr.Site(1, "attn")], roles=["object"], corruption="mask", draws=1)
    ).trace(tiny_facts(6))
    own, permuted = trace.permuted.T
    np.testing.assert_allclose(own, trace.at(trace.best()), atol=1e-6)
    assert (permuted <= own + 1e-6).all() and (permuted < own - 0.1).any()


# Options -------------------------------------------------------------------------------------------------------------


def test_teacher_forced_commits_have_no_later_effect():
    backbone = tiny_llada()
    trace = tr.CausalTracer(backbone, tr.TraceConfig(commits="teacher", draws=2)).trace(decoded_facts(backbone))
    assert trace.has("forced_ie") and not trace.has("tie") and not trace.has("ie")
    assert trace.summary()["effect"] == "forced_ie" and np.isfinite(trace.permuted).any()
    with pytest.raises(tr.tracing.TraceError, match="teacher"):
        trace.best()


@torch.no_grad()
def test_teacher_forced_runs_hold_the_truth():
    runs, given = runs_of(tiny_llada(), commits="teacher")
    runs.sequence.ids[-1] = 5  # not what the model decodes
    clean = runs.clean([])
    scores = runs.corrupted(clean, given, [(0, None), (1, None)])
    assert clean.final.tolist() == runs.sequence.ids.tolist()
    np.testing.assert_array_equal(scores.masked, np.repeat(clean.scores.masked, 2, axis=0))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random"}])
def test_runs_differ_by_what_is_restored_and_not_by_sampling_noise(options):
    backbone = tiny_llada()
    sampler = SamplerConfig(steps=3, **options)
    sites = [tr.Site(2)]
    tracer = tr.CausalTracer(
        backbone,
        tr.TraceConfig(sites=sites, roles=["object"], sampler=sampler, draws=2, min_total_effect=1e-6, batch_size=3),
    )
    trace = tracer.trace(decoded_facts(backbone, 8))
    effect = trace.tie[:, 0, 0, 0]
    assert np.isfinite(effect).sum() >= 2  # elsewhere the noise did no harm at the later steps
    np.testing.assert_allclose(effect[np.isfinite(effect)], 1.0, atol=1e-3)


@pytest.mark.parametrize("commits", ["free", "teacher"])
def test_pruning_measures_less_and_the_same(commits):
    """What is measured is what it is without pruning; the control stays where a site does; the choice is the same."""
    backbone, effect = tiny_llada(), "tie" if commits == "free" else "forced_ie"
    facts = decoded_facts(backbone)
    options = {"draws": 10, "commits": commits, "sampler": SamplerConfig(steps=3)}
    full = tr.CausalTracer(backbone, tr.TraceConfig(**options)).trace(facts)
    pruned = tr.CausalTracer(backbone, tr.TraceConfig(prune=0.05, **options)).trace(facts)
    measured = (pruned.measured["log_prob"][effect], full.measured["log_prob"][effect])
    made, could = (np.isfinite(values) for values in measured)
    assert made.sum() < 0.9 * could.sum() and not (made & ~could).any()
    np.testing.assert_allclose(measured[0][made], measured[1][made], atol=1e-5)
    sites, control = made[:, :, :-1].any(2), made[:, :, -1]
    assert (control == sites & could[:, :, -1]).all()
    assert pruned.best("per_fact", effect=effect) == full.best("per_fact", effect=effect)


def test_the_last_step_has_no_later_one():
    backbone = tiny_llada()
    trace = tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(decoded_facts(backbone))
    assert np.isnan(trace.tie[:, :, -1]).all()
    assert np.isfinite(trace.tie[:, :, :-1]).any()
    assert trace.steps == (0, 1, 2)  # three tokens take three of the eight steps


def test_one_denoising_step():
    backbone = tiny_llada()
    trace = tr.CausalTracer(backbone, tr.TraceConfig(sampler=SamplerConfig(steps=1), draws=1)).trace(
        decoded_facts(backbone)
    )
    assert np.isnan(trace.tie).all() and np.isfinite(trace.ie).all()
    with pytest.raises(tr.tracing.TraceError, match="no later-step effect|has a later one"):
        trace.best()
    assert trace.best(effect="ie").step == 0
    json.dumps(trace.summary(), allow_nan=False)


def test_filler_after_the_object_is_not_scored():
    """Both canvases are fully masked at step 0, and the object's tokens are the same: filler only adds masks."""
    backbone = planted()
    short, long = (
        tr.CausalTracer(
            backbone, tr.TraceConfig(corruption="mask", canvas=canvas, sampler=SamplerConfig(steps=6))
        ).trace(tiny_facts(2))
        for canvas in (3, 6)
    )
    np.testing.assert_allclose(short.clean[:, 0], long.clean[:, 0], atol=1e-5)


# Facts that cannot be traced -----------------------------------------------------------------------------------------


def test_without_noise_nothing_is_traceable():
    backbone = tiny_llada()
    facts = decoded_facts(backbone, 2)
    trace = tr.CausalTracer(backbone, tr.TraceConfig(noise_scale=0.0, draws=1)).trace(facts)
    assert trace.facts == () and list(trace.not_traceable) == [fact.id for fact in facts]
    assert all("nats a token" in reason for reason in trace.not_traceable.values())
    assert trace.tie.shape == (0, 9, 3, 2)
    with pytest.raises(tr.tracing.TraceError, match="none of the 2 facts"):
        trace.best()
    assert "nothing to report" in trace.summary()["verdict"]


def test_facts_the_model_does_not_know_give_no_map():
    """The corruption takes nothing away: every fact has the answer to another question."""
    known = tiny_facts(4)
    unknown = [replace(fact, object=known[i - 1].object) for i, fact in enumerate(known)]
    trace = tr.CausalTracer(planted(), tr.TraceConfig(corruption="mask")).trace(unknown)
    assert trace.facts == () and len(trace.not_traceable) == 4 and not trace.has("tie") and not trace.has("ie")
    assert all("takes away nothing" in reason for reason in trace.not_traceable.values())
    for refused in (trace.best, trace.claim, trace.temporal_gain, trace.table):
        with pytest.raises(tr.tracing.TraceError, match="none of the 4 facts"):
            refused()
    summary = trace.summary()
    assert "nothing to report" in summary["verdict"] and summary["facts"] == 0
    json.dumps(summary, allow_nan=False)
    some = tr.CausalTracer(planted(), tr.TraceConfig(corruption="mask")).trace([*unknown[:2], *known[2:]])
    assert some.facts == ("tiny-2", "tiny-3") and list(some.not_traceable) == ["tiny-0", "tiny-1"]


def test_a_fact_without_its_subject_is_refused():
    with pytest.raises(FactError, match="as whole words in the prompt"):
        replace(tiny_facts(1)[0], subject="nigeria")


@pytest.mark.parametrize("beyond", [1, 2, 3])
def test_a_subject_that_truncation_would_split_is_reported(beyond):
    """Nothing is truncated: with so many tokens before it, the context would end within the subject."""
    backbone = planted()
    limit = backbone.max_length
    long = Fact(
        id="long", prompt="the " * (limit - 3 + beyond) + "old new kenya", subject="old new kenya", object="kex"
    )
    trace = tr.CausalTracer(backbone, tr.TraceConfig(corruption="mask")).trace([long, *tiny_facts(1)])
    assert trace.facts == ("tiny-0",) and "context" in trace.not_traceable["long"]


def test_an_object_longer_than_the_canvas_is_reported():
    backbone = planted()
    short = replace(tiny_facts(2)[1], object="pex")
    trace = tr.CausalTracer(backbone, tr.TraceConfig(canvas=2, corruption="mask")).trace([*tiny_facts(1), short])
    assert trace.facts == (short.id,)
    assert "canvas of 2" in trace.not_traceable["tiny-0"]


def test_a_sequence_longer_than_the_context_is_reported():
    backbone = planted()
    long = Fact(id="long", prompt="the " * 200 + "kenya", subject="kenya", object="kex key")
    trace = tr.CausalTracer(backbone, tr.TraceConfig(corruption="mask")).trace([long, *tiny_facts(1)])
    assert trace.facts == ("tiny-0",) and "context" in trace.not_traceable["long"]


def test_a_subject_without_a_peer_is_reported():
    facts = [
        *tiny_facts(2),
        Fact(id="wide", prompt="the capital of old new kenya", subject="old new kenya", object="kex key kez"),
    ]
    trace = tr.CausalTracer(planted(), tr.TraceConfig(corruption="subject")).trace(facts)
    assert "no other fact has a subject of 3 tokens" in trace.not_traceable["wide"]
    assert trace.facts == ("tiny-0", "tiny-1")


def test_logits_that_are_not_finite_are_an_error():
    backbone = tiny_llada()
    facts = decoded_facts(backbone, 2)
    with torch.no_grad():
        backbone.head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="tiny-0"):
        tr.CausalTracer(backbone).trace(facts)


# Stopping, going on, leaving nothing behind --------------------------------------------------------------------------


def interrupt_after(calls):
    count = 0

    def progress(done, total, label):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_trace_goes_on_to_the_same_result(tmp_path):
    backbone = tiny_llada()
    facts = decoded_facts(backbone)
    whole = tr.CausalTracer(backbone, tr.TraceConfig(draws=2)).trace(facts)
    path = tmp_path / "trace.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tr.CausalTracer(backbone, tr.TraceConfig(draws=2), progress=interrupt_after(12)).trace(facts, checkpoint=path)
    kept = path.read_text().splitlines()
    assert 2 <= len(kept) < 1 + len(facts)
    with path.open("a") as file:
        file.write('{"id": "tiny-3", "ti')  # cut short by a crash
    resumed = tr.CausalTracer(backbone, tr.TraceConfig(draws=2)).trace(facts, checkpoint=path)
    assert same(whole, resumed) and whole.summary() == resumed.summary()
    assert path.read_text().splitlines()[: len(kept)] == kept
    assert not list(tmp_path.glob("*.tmp"))


def test_a_finished_checkpoint_costs_no_tracing(tmp_path, monkeypatch):
    backbone = tiny_llada()
    facts = decoded_facts(backbone)
    first = tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts, checkpoint=tmp_path / "t.jsonl")
    monkeypatch.setattr(OneFact, "record", lambda *a: pytest.fail("traced again"))
    assert same(first, tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts, checkpoint=tmp_path / "t.jsonl"))


def test_a_checkpoint_of_another_trace_is_refused(tmp_path):
    backbone, path = tiny_llada(), tmp_path / "t.jsonl"
    facts = decoded_facts(backbone, 2)
    tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts, checkpoint=path)
    before = path.read_text()
    with pytest.raises(CheckpointError, match="differs in draws"):
        tr.CausalTracer(backbone, tr.TraceConfig(draws=2)).trace(facts, checkpoint=path)
    with pytest.raises(CheckpointError, match="differs in facts"):
        tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts[:1], checkpoint=path)
    with pytest.raises(CheckpointError, match="differs in fingerprint"):
        tr.CausalTracer(tiny_llada(seed=1), tr.TraceConfig(draws=1)).trace(facts, checkpoint=path)
    assert path.read_text() == before
    (tmp_path / "other").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts, checkpoint=tmp_path / "other")


@LAYOUTS
def test_an_interrupt_leaves_no_hook_and_no_change(make, monkeypatch):
    backbone = make()
    facts = decoded_facts(backbone)
    before, digest = hooks_on(backbone), backbone.state_digest()
    forward, calls, inside = backbone.architecture.call, 0, 0

    def stop(model, ids):
        nonlocal calls, inside
        calls += 1
        inside = max(inside, hooks_on(backbone))
        if calls == 20:
            raise KeyboardInterrupt
        return forward(model, ids)

    backbone.architecture = replace(backbone.architecture, call=stop)
    with pytest.raises(KeyboardInterrupt):
        tr.CausalTracer(backbone, tr.TraceConfig(draws=2)).trace(facts)
    assert inside > before and hooks_on(backbone) == before
    assert backbone.state_digest() == digest


def test_progress_counts_up_to_the_end():
    backbone, seen = tiny_llada(), []
    facts = decoded_facts(backbone)
    tr.CausalTracer(backbone, tr.TraceConfig(draws=2), progress=lambda *event: seen.append(event)).trace(facts)
    tracing = [event for event in seen if "permuted" not in event[2]]
    done = [event[0] for event in tracing]
    assert done == sorted(done) and done[0] == 0 and done[-1] == tracing[-1][1] > 0
    assert {event[2] for event in tracing} == {fact.id for fact in facts}


def test_the_same_seed_gives_the_same_trace_and_another_does_not():
    backbone = tiny_llada()
    facts = decoded_facts(backbone)
    first, again, other = (
        tr.CausalTracer(backbone, tr.TraceConfig(draws=2, seed=seed)).trace(facts) for seed in (0, 0, 1)
    )
    assert same(first, again) and not same(first, other)


def test_tracing_works_under_hooks_of_others():
    """E.g. with a memory attached: its hooks stay, and what they change is part of the model."""
    backbone = tiny_llada()
    facts = decoded_facts(backbone)
    plain = tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts)
    with Hooks(backbone, {tr.Site(1): lambda output: output * 1.5}):
        changed = tr.CausalTracer(backbone, tr.TraceConfig(draws=1)).trace(facts)
    assert not np.allclose(plain.clean[:2, 0], changed.clean[:2, 0])


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "after"}, "window"),
        ({"corruption": "swap"}, "corruption"),
        ({"commits": "forced"}, "commits"),
        ({"roles": ["answer"]}, "roles"),
        ({"roles": []}, "roles"),
        ({"sites": [tr.Site(9)]}, "layers 0 to 2"),
        ({"modules": ["ffn"]}, "module"),
        ({"steps": [-1]}, "count from 0"),
        ({"steps": [1, 1]}, "each once"),
        ({"draws": 0}, "draws"),
        ({"canvas": 0}, "canvas"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"min_total_effect": 0.0}, "min_total_effect"),
        ({"prune": 1.0}, "prune"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 2}, "steps as a list"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tr.CausalTracer(tiny_llada(), tr.TraceConfig(**options))


def test_wrong_facts_are_named():
    tracer = tr.CausalTracer(planted(), tr.TraceConfig(corruption="mask"))
    with pytest.raises(ValueError, match="no facts"):
        tracer.trace([])
    with pytest.raises(ValueError, match="tiny-0"):
        tracer.trace([*tiny_facts(1), *tiny_facts(1)])
    with pytest.raises(TypeError, match="wrap"):
        tr.CausalTracer(planted().model)
