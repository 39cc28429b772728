"""The splice against a slow oracle: values, labels, mask, positions, gradients, errors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from av_llava.errors import BudgetError, UsageError
from av_llava.splice import Segment, SplicePlan, splice

torch.set_num_threads(1)
WIDTH, VOCAB = 4, 50


def oracle(embed, plan, features):
    """Row by row, with plain indexing."""
    length = plan.shape[1]
    rows = []
    for segments in plan.samples:
        content = []
        for s in segments:
            for r in range(s.lo, s.hi):
                if s.kind == "text":
                    content.append(embed.weight[int(plan.text_ids[r])])
                else:
                    content.append(features[s.kind][s.item][r].to(embed.weight.dtype))
        pad = [torch.zeros(WIDTH, dtype=embed.weight.dtype)] * (length - len(content))
        content = pad + content if plan.padding_side == "left" else content + pad
        rows.append(torch.stack(content) if content else torch.zeros(0, WIDTH))
    return torch.stack(rows)


@st.composite
def batches(draw):
    """Any order of text and pieces of media, some media cut into regular runs."""
    counts = {
        kind: tuple(draw(st.lists(st.integers(1, 12), min_size=0, max_size=3)))
        for kind in ("image", "video", "audio")
    }
    media = [(kind, i, n) for kind, items in counts.items() for i, n in enumerate(items)]
    n_samples = draw(st.integers(1, 3))
    samples = [[] for _ in range(n_samples)]
    for kind, item, n in draw(st.permutations(media)):
        row = samples[draw(st.integers(0, n_samples - 1))]
        step = draw(st.integers(1, n))
        gap = draw(st.integers(0, 2))
        for lo in range(0, n, step):
            row.append(Segment(kind, item, lo, min(n, lo + step)))
            row.append(np.arange(1, 1 + gap))
    for row in samples:
        row.insert(0, np.array(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))))
        row.append(np.array([7]))
    parts = [[p if isinstance(p, Segment) else (p, p + 100) for p in row] for row in samples]
    side = draw(st.sampled_from(["left", "right"]))
    return SplicePlan.build(parts, counts, supervised=True, padding_side=side)


def make_features(plan, requires_grad=True, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return {
        kind: [
            torch.randn(n, WIDTH, generator=gen, dtype=dtype).requires_grad_(requires_grad)
            for n in items
        ]
        for kind, items in plan.counts.items()
    }


@settings(max_examples=150, deadline=None)
@given(batches())
def test_splice_equals_oracle_in_values_and_gradients(plan):
    torch.manual_seed(0)
    embed = torch.nn.Embedding(VOCAB, WIDTH)
    ours, theirs = make_features(plan), make_features(plan)
    out = splice(embed, plan, ours)
    expected = oracle(embed, plan, theirs)
    assert torch.equal(out, expected)
    seed = torch.randn(out.shape)
    names = [(k, i) for k, items in ours.items() for i in range(len(items))]
    wanted = torch.autograd.grad(
        expected, [embed.weight, *(theirs[k][i] for k, i in names)], seed, allow_unused=True
    )
    found = torch.autograd.grad(out, [embed.weight, *(ours[k][i] for k, i in names)], seed)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_the_indexed_path_of_cuda_equals_the_slices(plan):
    embed = torch.nn.Embedding(VOCAB, WIDTH)
    results = []
    for indexed in (False, True):
        features = make_features(plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "av_llava.splice._indexed", lambda buffer, copies, on=indexed: on and bool(copies)
            )
            out = splice(embed, plan, features)
            leaves = [embed.weight, *(t for items in features.values() for t in items)]
            seed = torch.arange(out.numel(), dtype=out.dtype).view_as(out)
            results.append([out, *torch.autograd.grad(out, leaves, seed)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_rows_may_be_taken_out_of_order():
    parts = [[Segment("video", 0, 4, 6), (np.array([1]), None), Segment("video", 0, 0, 4)]]
    plan = SplicePlan.build(parts, {"video": [6]})
    embed = torch.nn.Embedding(VOCAB, WIDTH)
    for indexed in (False, True):
        features = make_features(plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("av_llava.splice._indexed", lambda buffer, copies, on=indexed: on)
            out = splice(embed, plan, features)
            out.sum().backward()
        assert torch.equal(out, oracle(embed, plan, features))
        assert (features["video"][0].grad == 1).all()


@settings(max_examples=100, deadline=None)
@given(batches())
def test_host_tensors_agree_with_segments(plan):
    mask, positions, labels = plan.attention_mask(), plan.position_ids(), plan.labels()
    ids = plan.input_ids({"image": -200, "video": -201, "audio": -202}, pad_id=99)
    for i, n in enumerate(plan.lengths):
        lo = plan.offset(i)
        assert mask[i].sum() == n and mask[i, lo : lo + n].all()
        assert positions[i, lo : lo + n].tolist() == list(range(n))
        content = ids[i, lo : lo + n]
        flat = [(s, r) for s in plan.samples[i] for r in range(s.lo, s.hi)]
        for row, (s, r) in enumerate(flat):
            if s.kind == "text":
                assert content[row] == plan.text_ids[r]
                assert labels[i, lo + row] == plan.text_ids[r] + 100
            else:
                assert content[row] == {"image": -200, "video": -201, "audio": -202}[s.kind]
                assert labels[i, lo + row] == -100
        assert (labels[i][mask[i] == 0] == -100).all()
        assert (ids[i][mask[i] == 0] == 99).all()


def small_plan(**kwargs):
    ids = torch.tensor([[1, 2, -200, 3, 0], [4, -201, 5, -200, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    items = [[("image", 0)], [("video", 0), ("image", 1)]]
    return SplicePlan.from_ids(
        ids, items, {"image": [3, 2], "video": [4]}, attention_mask=mask, **kwargs
    )


def test_from_ids_reads_the_mask_and_expands_sentinels():
    plan = small_plan(labels=torch.tensor([[1, 2, 9, 3, 0], [4, 9, 5, 9, 6]]))
    assert plan.lengths == (6, 9)
    assert plan.labels()[0].tolist() == [1, 2, -100, -100, -100, 3, -100, -100, -100]
    assert plan.n_tokens("image") == 5 and plan.n_tokens("image", 1) == 2


def test_input_padding_side_does_not_matter():
    right = small_plan()
    left = SplicePlan.from_ids(
        torch.tensor([[0, 1, 2, -200, 3], [4, -201, 5, -200, 6]]),
        [[("image", 0)], [("video", 0), ("image", 1)]],
        {"image": [3, 2], "video": [4]},
        attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    )
    assert left.samples == right.samples and (left.text_ids == right.text_ids).all()


def test_a_regular_interleave_becomes_few_copies():
    from av_llava.splice import _Layout

    parts = []
    for frame in range(64):
        parts.append(Segment("video", 0, frame * 9, frame * 9 + 9))
        parts.append(Segment("audio", 0, frame * 5, frame * 5 + 5))
    plan = SplicePlan.build([parts], {"video": [576], "audio": [320]})
    layout = _Layout(plan, [("text", 0), ("video", 0), ("audio", 0)])
    assert [len(c) for c in layout.by_source] == [0, 1, 1]


def test_count_mismatch_names_item_and_both_numbers():
    plan = small_plan()
    features = make_features(plan)
    features["image"][1] = torch.zeros(5, WIDTH)
    with pytest.raises(UsageError, match="image 1: 2 tokens were planned.* 5 rows"):
        splice(torch.nn.Embedding(VOCAB, WIDTH), plan, features)
    with pytest.raises(UsageError, match=r"plans 2 image item\(s\), but features of 1"):
        splice(torch.nn.Embedding(VOCAB, WIDTH), plan, {**features, "image": features["image"][:1]})


def test_wrong_width_and_unplaced_features_are_refused():
    plan = small_plan()
    features = make_features(plan)
    with pytest.raises(UsageError, match=r"expected \[rows, 6\]"):
        splice(torch.nn.Embedding(VOCAB, 6), plan, features)
    with pytest.raises(UsageError, match="audio 0 has features, but no place"):
        splice(
            torch.nn.Embedding(VOCAB, WIDTH), plan, {**features, "audio": [torch.zeros(1, WIDTH)]}
        )


def test_zero_rows_join_the_graph():
    plan = small_plan()
    unused = torch.ones(3, WIDTH, requires_grad=True)
    out = splice(
        torch.nn.Embedding(VOCAB, WIDTH), plan, {**make_features(plan), "absent": [unused[:0]]}
    )
    out.sum().backward()
    assert unused.grad is not None and (unused.grad == 0).all()


def test_sentinels_and_media_must_match():
    with pytest.raises(UsageError, match="Sample 0 has 1 media placeholders .* 2 media"):
        SplicePlan.from_ids(
            torch.tensor([[1, -200]]), [[("image", 0), ("image", 1)]], {"image": [1, 1]}
        )


def test_truncation_cuts_text_with_a_message_and_never_media(caplog):
    plan = small_plan()
    assert plan.truncated(9) is plan
    cut = plan.truncated(8)
    assert cut.lengths == (6, 8)
    assert "1 of 9 positions were cut" in caplog.text
    with pytest.raises(BudgetError, match="Sample 1 needs 9 positions.* cut image 1"):
        plan.truncated(7)


def test_features_of_another_dtype_keep_their_gradient_dtype():
    plan = small_plan()
    features = make_features(plan, dtype=torch.bfloat16)
    out = splice(torch.nn.Embedding(VOCAB, WIDTH), plan, features)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert features["video"][0].grad.dtype == torch.bfloat16


def test_the_embedding_is_called_once_as_a_module():
    calls = []
    embed = torch.nn.Embedding(VOCAB, WIDTH)
    embed.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    plan = small_plan()
    splice(embed, plan, make_features(plan))
    assert calls == [(len(plan.text_ids),)]


def test_plans_can_be_pickled():
    plan = pickle.loads(pickle.dumps(small_plan()))
    assert plan.lengths == (6, 9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu_without_a_sync():
    parts = [[(np.arange(1, 30), None)], [(np.arange(3), None)]]
    n, at = 200, 0
    for i in range(40):
        parts[0].append(Segment("video", 0, at, at + 2 + i % 3))
        parts[0].append((np.array([5]), None))
        at += 2 + i % 3
    plan = SplicePlan.build(parts, {"video": [at]})
    assert at < n
    embed = torch.nn.Embedding(VOCAB, WIDTH)
    features = make_features(plan, requires_grad=False)
    expected = splice(embed, plan, features)
    embed = embed.cuda()
    on_device = {k: [t.cuda().requires_grad_() for t in v] for k, v in features.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = splice(embed, plan, on_device)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), expected)
