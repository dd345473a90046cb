"""Does the bench run whole optimizer steps and say what they took?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training import bench, distributed


def test_a_tiny_recipe_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/result.json"
    arguments = ["demo", "--micro-batch", "1", "--batch-tokens", "256", "--steps", "1", "--json", str(out)]
    assert bench.main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["tokens_per_second"] == pytest.approx(256 / result["step_ms"] * 1e3, rel=0.01)
    assert 9 < result["loss"] < 11.5  # the logarithm of the vocabulary
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["d13"], "no GPT-2 of depth 13"),
        (["nonsense"], "no recipe and no model"),
        (["demo", "--batch-tokens", "300"], "batch_tokens=300"),
        (["demo", "--micro-batch", "0"], "--micro-batch 0"),
        (["demo", "--steps", "0"], "--steps 0"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_the_ranks_cannot_share_is_named_with_them() -> None:
    world = distributed.join()
    with pytest.raises(ValueError, match="batch_tokens=256 is not a multiple of 2 ranks x 1 x 256 tokens"):
        bench.Bench(bench.configure("demo", 1, 256), replace(world, size=2))
    distributed.leave()


def test_kernels_are_told_apart() -> None:
    names = {
        "nvjet_sm90_tst_320x128_64x3_1x2_h_badd_coopB_NTT": "matmul",
        "void cudnn::fusion::matmul_dq<true, 64>(void const*)": "attention",
        "_norm_backward": "LayerNorm and residual",
        "_gelu_backward_quantize": "quantization",
        "_sum_columns": "bias gradients",
        "_update": "optimizer and clipping",
    }
    assert {name: bench.kind_of(name) for name in names} == names
