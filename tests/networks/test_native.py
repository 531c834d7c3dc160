"""The compiled kernels. Oracles: the specification csrc/reference.cpp, itself checked against the
formula in PyTorch's operations in float64; autograd through that formula."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import rms_norm

from miniflux.networks import native
from miniflux.networks.attention import (
    apply_rope,
    attention,
    attention_backend,
    formula,
    rope_table,
)

pytestmark = pytest.mark.skipif(
    native._cpu is None and os.environ.get("MINIFLUX_REQUIRE_NATIVE") != "1",
    reason="miniflux._cpu is not built: there is no compiler here",
)

# (B, H, S, D) and L, the number of text tokens. The kernel works in blocks of 16 tokens.
SHAPES = [
    ((1, 1, 1, 2), 0),
    ((2, 3, 5, 6), 2),
    ((1, 2, 16, 32), 16),                                   # text alone
    ((2, 1, 33, 48), 0),                                    # no text
    ((1, 4, 96, 64), 32),
    ((1, 2, 150, 128), 31),
]


def problem(shape, dtype=torch.float32) -> list:
    B, H, S, D = shape
    torch.manual_seed(0)
    ids = torch.randint(50, (S, 1))
    qkv = torch.randn(B, S, 3, H, D).to(dtype)
    img_scale, txt_scale = (1 + 0.3 * torch.randn(2, 2, D)).to(dtype)
    return [qkv, rope_table(ids, (D,), 10000.0), img_scale, txt_scale]


def reference(qkv, pe, img_scale, txt_scale, L):
    """csrc/reference.cpp, in float32."""
    qkv, img_scale, txt_scale = (x.float().contiguous() for x in (qkv, img_scale, txt_scale))
    B, S, _, H, D = qkv.shape
    out = torch.full((B, S, H * D), torch.nan)
    native._cpu.attention_reference(
        (B, H, S, L, D), qkv.data_ptr(), qkv.stride()[:4], txt_scale.data_ptr(),
        img_scale.data_ptr(), pe.data_ptr(), out.data_ptr(),
    )
    return out


def written_out(qkv, pe, img_scale, txt_scale, L):
    """The same in PyTorch's operations, in the dtype of qkv."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    S, D = q.shape[-2:]
    is_text = (torch.arange(S) < L)[:, None]

    def rotated(x, scale):
        x = rms_norm(x, (D,), eps=1e-6) * scale
        even, odd = x[..., ::2], x[..., 1::2]
        first = pe[..., 0, 0] * even + pe[..., 0, 1] * odd
        second = pe[..., 1, 0] * even + pe[..., 1, 1] * odd
        return torch.stack([first, second], -1).flatten(-2)

    q_scale, k_scale = torch.where(is_text, txt_scale[:, None], img_scale[:, None])  # each (S, D)
    return formula(rotated(q, q_scale), rotated(k, k_scale), v).transpose(1, 2).flatten(2)


def error(ours, theirs) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def launch_nothing(function, tokens: int = 1) -> None:
    """Calls a function of miniflux._cuda for this many tokens, with null for every address."""
    function((1, 1, tokens, 0, 32), 0, (96, 96, 32, 32), 0, 0, 0, 0, 0)


def test_the_modules_are_there_where_they_are_required():
    """The CUDA kernels can be imported without a GPU and without a driver; a launch raises."""
    assert native._cpu is not None, native.WHY_NOT
    required = os.environ.get("MINIFLUX_REQUIRE_NATIVE") == "1" and shutil.which("nvcc")
    # Note: setup.py builds them where PyTorch has CUDA, or where it is asked to.
    if not required or not (torch.version.cuda or os.environ.get("MINIFLUX_CUDA") == "1"):
        return
    cuda, why_not = native.find("miniflux._cuda")
    assert cuda is not None, why_not
    names = {name for name in dir(cuda) if not name.startswith("_")}
    kernels = ("norm_rope", "attention", *native.RUNGS)
    assert names == {f"{kernel}_{dtype}" for kernel in kernels for dtype in native.DTYPES.values()}
    takes = "mma takes float16 and bfloat16, heads of 32, 64 or 128 channels"
    with pytest.raises(RuntimeError, match=takes):
        launch_nothing(cuda.mma_float32)
    launch_nothing(cuda.attention_bfloat16, tokens=0)       # of no tokens there is nothing to do
    if not torch.cuda.is_available():
        for kernel in names - {"mma_float32"}:
            with pytest.raises(RuntimeError, match="CUDA|driver"):
                launch_nothing(getattr(cuda, kernel))


@pytest.mark.parametrize("shape, L", SHAPES)
def test_the_specification_is_the_formula(shape, L):
    args = problem(shape)
    assert error(reference(*args, L), written_out(*(x.double() for x in args), L)) < 2e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape, L", SHAPES)
def test_the_kernel_is_the_specification(shape, L, dtype, bound):
    args = problem(shape, dtype)
    assert error(native.attention(*args, L), reference(*args, L)) < bound


@pytest.mark.skipif(native._cuda is None or not torch.cuda.is_available(),
                    reason="miniflux._cuda is not built, or there is no GPU here")
@pytest.mark.parametrize("dtype, bound", [
    (torch.float32, 2e-6),
    (torch.float16, 5e-4),
    (torch.bfloat16, 4e-3),
])
@pytest.mark.parametrize("kernel", ["attention", *native.RUNGS])
@pytest.mark.parametrize("shape, L", [
    *SHAPES,
    ((2, 3, 300, 32), 40),
    ((1, 2, 257, 64), 0),
    ((2, 2, 1000, 128), 999),
])
def test_every_rung_of_the_cuda_ladder_is_the_specification(shape, L, kernel, dtype, bound):
    args = problem(shape, dtype)
    on_gpu = [x.cuda() for x in args]
    widths = {"mma": (32, 64, 128), "wgmma": (64, 128)}.get(kernel)
    if kernel == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
        with pytest.raises(RuntimeError, match="wgmma needs an H100"):
            native.attend(*on_gpu, L, kernel)
    elif widths and (dtype == torch.float32 or shape[-1] not in widths):
        with pytest.raises(RuntimeError, match="mma takes"):
            native.attend(*on_gpu, L, kernel)
    else:
        ours, theirs = native.attend(*on_gpu, L, kernel).cpu(), reference(*args, L)
        assert (ours - theirs).norm() / theirs.norm() < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_norm_rope_rotates_queries_and_keys_in_place_and_leaves_the_values(dtype, bound):
    qkv, pe, img_scale, txt_scale = problem((2, 3, 21, 16), dtype)
    before = qkv.clone()
    after = native.norm_rope(qkv, pe, img_scale, txt_scale, 4)
    assert after.data_ptr() == qkv.data_ptr() and torch.equal(qkv[:, :, 2], before[:, :, 2])
    for which in (0, 1):
        x = rms_norm(before[:, :, which].double().transpose(1, 2), (16,), eps=1e-6)
        scale = torch.cat([txt_scale[which].expand(4, 16), img_scale[which].expand(17, 16)])
        expected = apply_rope((x * scale.double()).float(), pe)
        # Note: bfloat16 itself rounds by 4e-3.
        assert error(qkv[:, :, which].transpose(1, 2), expected) < bound


def test_rows_may_be_a_part_of_wider_rows():
    qkv, pe, img_scale, txt_scale = problem((2, 3, 21, 16))
    wide = torch.randn(2, 21, 7 + 3 * 48 + 5)
    wide[..., 7:-5] = qkv.flatten(2)
    part = wide[..., 7:-5].unflatten(-1, (3, 3, 16))
    expected = native.attention(qkv, pe, img_scale, txt_scale, 4)
    assert torch.equal(native.attention(part, pe, img_scale, txt_scale, 4), expected)


def test_a_batch_equals_its_singles_and_threads_change_nothing():
    qkv, pe, img_scale, txt_scale = problem((3, 2, 40, 32))
    together = native.attention(qkv, pe, img_scale, txt_scale, 8)
    second = native.attention(qkv[1:2], pe, img_scale, txt_scale, 8)
    assert torch.equal(together[1:2], second)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(together, native.attention(qkv, pe, img_scale, txt_scale, 8))
    torch.set_num_threads(threads)


def test_a_nan_reaches_what_looks_at_it_and_nothing_else():
    qkv, pe, img_scale, txt_scale = problem((1, 2, 40, 32))
    qkv[0, 7, 0, 1, 3] = torch.nan                          # a query of head 1: one row
    qkv[0, 5, 2, 0, 2] = torch.nan                          # a value of head 0: one channel
    out = native.attention(qkv, pe, img_scale, txt_scale, 8).isnan().view(40, 2, 32)
    expected = torch.zeros(40, 2, 32, dtype=torch.bool)
    expected[7, 1] = expected[:, 0, 2] = True
    assert torch.equal(out, expected)
    qkv[0, 9, 1, 1, 0] = torch.nan                          # a key of head 1: every row
    out = native.attention(qkv, pe, img_scale, txt_scale, 8).view(40, 2, 32)
    assert out[:, 1].isnan().all()


def test_large_scores_do_not_overflow():
    qkv, pe, img_scale, txt_scale = problem((1, 1, 20, 16))
    args = qkv, pe, 30 * img_scale, 30 * txt_scale
    out = native.attention(*args, 3)
    assert error(out, written_out(*(x.double() for x in args), 3)) < 1e-4  # one weight is all but 1
    assert out.isfinite().all()


def test_no_tokens_give_no_rows():
    for shape in ((1, 2, 0, 16), (0, 2, 5, 16)):
        args = problem(shape)
        assert native.attention(*args, 0).shape == (shape[0], shape[2], 32)
        native.norm_rope(*args, 0)


# -------------------------------------------------------------------- torch.compile and autograd


def test_the_op_is_what_pytorch_expects_of_one():
    torch.library.opcheck(native.attention_op, (*problem((1, 2, 9, 8)), 3))
    with_gradients = [x.requires_grad_(i != 1) for i, x in enumerate(problem((1, 2, 9, 8)))]
    with torch.enable_grad():
        torch.library.opcheck(native.attention_op, (*with_gradients, 3))
    torch.library.opcheck(native.norm_rope_op, (*problem((1, 2, 9, 8)), 3))


def test_the_gradients_are_those_of_the_formula():
    args = problem((2, 2, 19, 16))
    weights = torch.randn(2, 19, 32)

    def gradients(function):
        qkv, pe, img_scale, txt_scale = (x.clone() for x in args)
        leaves = [x.requires_grad_() for x in (qkv, img_scale, txt_scale)]
        with torch.enable_grad():
            loss = (function(qkv, pe, img_scale, txt_scale, 5) * weights).sum()
            return torch.autograd.grad(loss, leaves)

    for ours, theirs in zip(gradients(native.attention), gradients(written_out)):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("backend, op", [
    ("auto", "attention"),
    ("native", "attention"),
    ("norm_rope", "norm_rope"),
])
def test_a_compiled_graph_holds_the_kernel_whole(backend, op):
    def block(x, pe, img_scale, txt_scale):
        qkv = (x * 1.5).unflatten(-1, (3, 2, 16))
        return 2 * attention(qkv, pe, img_scale, txt_scale, 5, backend=backend)

    seen = []

    def look_inside(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    qkv, *others = problem((1, 2, 19, 16))
    compiled = torch.compile(block, fullgraph=True, backend=look_inside)
    assert error(compiled(qkv.flatten(2), *others), block(qkv.flatten(2), *others)) < 1e-6
    assert any(f"miniflux.{op}" in target for target in seen)


def test_norm_rope_refuses_tensors_that_need_gradients():
    qkv, *others = problem((1, 2, 9, 8))
    message = "has no gradients: use the attention backend 'native'"
    with torch.enable_grad(), pytest.raises(ValueError, match=message):
        attention(qkv.requires_grad_(), *others, backend="norm_rope")


# ------------------------------------------------------------------------------------- bad input


NAMES = ("qkv", "pe", "img_scale", "txt_scale")


@pytest.mark.parametrize("change, message", [
    ({"qkv": lambda x: x[..., :7]},
     r"qkv is torch.float32 \(1, 9, 3, 2, 7\): expected .* an even D"),
    ({"qkv": lambda x: x[:, :, :2]},
     r"qkv is .*\(1, 9, 2, 2, 8\): expected .*\(B, S, 3, H, D\)"),
    ({"qkv": lambda x: x.long()},
     "qkv is torch.int64 .*: expected floating-point numbers"),
    ({"pe": lambda x: x[:8]},
     r"RoPE table is torch.float32 \(8, 4, 2, 2\): expected float32 \(9, 4, 2, 2\)"),
    ({"pe": lambda x: x.bfloat16()},
     "RoPE table is torch.bfloat16"),
    ({"img_scale": lambda x: x[:1]},
     r"scales of image and text are \(1, 8\) and \(2, 8\)"),
    ({"L": 10},
     "for 10 text tokens of 9: expected"),
    ({"pe": lambda x: x.to("meta")},
     "lie on cpu, meta, cpu and cpu: expected one device"),
    ({"qkv": lambda x: x.half()},
     "takes float32 and bfloat16, with CUDA float16 too, not torch.float16"),
    ({"qkv": lambda x: x.mT.contiguous().mT},
     "must be neighbours in memory, not 2 numbers apart"),
    (dict.fromkeys(NAMES, lambda x: x.to("meta")),
     "computes on the CPU and with CUDA, and the tensors are on meta"),
])
def test_what_does_not_fit_is_one_sentence(change, message):
    tensors = dict(zip(NAMES, problem((1, 2, 9, 8))))
    args = [change[name](x) if name in change else x for name, x in tensors.items()]
    L = change.get("L", 3)
    with pytest.raises(ValueError, match=message):
        attention(*args, L, backend="native")
    if not any(x.is_meta for x in args):                    # there PyTorch skips the kernel itself
        with pytest.raises(ValueError, match=message):
            torch.ops.miniflux.attention(*args, L)


# ------------------------------------------------------------------- with and without the module


def test_a_missing_module_is_named_only_where_it_is_asked_for(monkeypatch):
    args = problem((1, 2, 9, 8))
    expected = attention(*args, 3)
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "WHY_NOT", "No module named 'miniflux._cpu'")
    torch.testing.assert_close(attention(*args, 3), expected, rtol=1e-5, atol=1e-6)
    message = "'native' cannot be used here: miniflux._cpu is not built .*: install a C.. compiler"
    with pytest.raises(ValueError, match=message):
        attention(*args, 3, backend="native")


def run(folder, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_command_lists_the_kernels(tmp_path):
    for words in (("miniflux.networks.native",), ("miniflux", "native")):
        result = run(tmp_path, *words)
        assert result.returncode == 0 and len(result.stdout.splitlines()) <= 6
        assert "used on the CPU in float32 and bfloat16, with " in result.stdout


def test_a_mistake_on_the_command_line_gets_one_line_and_exit_code_2(tmp_path):
    for words in (("miniflux.networks.native",), ("miniflux", "native")):
        result = run(tmp_path, *words, "--cuda")
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.count("\n") == 1 and "--cuda" in result.stderr


def test_the_backend_in_force_may_be_native_by_name():
    args = problem((1, 2, 9, 8))
    with attention_backend("native"):
        assert torch.equal(attention(*args, 3), native.attention(*args, 3))
