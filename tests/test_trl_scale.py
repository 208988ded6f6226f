"""Credit on several processes: each completion is weighed as by one process that holds all of them.

The runs are started by torchrun, with gloo on the CPU, as users start theirs; they assert how many
processes there were, since a launcher that starts only one is easily overlooked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad

pytest.importorskip("trl")
from attnprobe import classify_heads
from attnprobe.rl import CoupledRhythmCredit, Rollout, credit_weights, measure_rollout, score_rollout
from attnprobe.testing.tiny_models import tiny_model

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("credited_run.py")


def run_two_processes(kind: str, folder: Path) -> list[dict]:
    """Run the script in two processes and return what each of them wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), kind, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def joined(outputs: list[dict], name: str, *, left: bool = False, value: float = 0) -> torch.Tensor:
    """Return a tensor of both processes, padded to the same width."""
    width = max(output[name].shape[1] for output in outputs)
    missing = [width - output[name].shape[1] for output in outputs]
    return torch.cat(
        [
            pad(output[name], (m, 0) if left else (0, m), value=value)
            for output, m in zip(outputs, missing, strict=True)
        ]
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_each_completion_is_weighed_as_in_a_run_of_one_process(kind, tmp_path) -> None:
    ranks = run_two_processes(kind, tmp_path)
    assert [rank["world"] for rank in ranks] == [2, 2]
    # Under FSDP2 every parameter is sharded; otherwise each process has them all.
    assert all((rank["sharded"] == rank["parameters"]) == (kind == "fsdp2") for rank in ranks)
    weighted = 0
    for step in range(3):
        parts = [rank["records"][step] for rank in ranks]
        outputs = [part["output"] for part in parts]
        rollout = Rollout(
            joined(outputs, "prompt_ids", left=True),
            joined(outputs, "prompt_mask", left=True),
            joined(outputs, "completion_ids"),
            joined(outputs, "completion_mask"),
        )
        assert rollout.completion_ids.shape[0] == 8
        assert not torch.equal(outputs[0]["completion_ids"], outputs[1]["completion_ids"])
        for name, value in parts[0]["policy"].items():
            assert torch.equal(value, parts[1]["policy"][name])
        policy = tiny_model("llama", vocab_size=300)
        policy.load_state_dict(parts[0]["policy"])
        statistics = measure_rollout(policy, rollout, horizon=(1, 4))
        gamma = CoupledRhythmCredit()(score_rollout(statistics, None, rollout))
        advantages = torch.cat([output["advantages"] for output in outputs])
        expected = credit_weights(advantages, gamma, rollout.response_mask)
        expected[advantages == 0] = 1.0
        assert torch.equal(joined(outputs, "credit_weights", value=1.0), expected)
        weighted += int((expected != 1).sum())
    assert weighted > 10
    # The log is of both processes: they would not agree otherwise.
    logged = ranks[0]["log"][0]
    first = [rank["records"][0]["output"] for rank in ranks]
    matters = torch.cat([output["advantages"] for output in first]) != 0
    inside = (joined(first, "completion_mask") * matters[:, None]).bool()
    mean = joined(first, "credit_weights", value=1.0)[inside].mean()
    assert logged["credit/gamma_mean"] == pytest.approx(float(mean), abs=1e-6)


@pytest.mark.parametrize("kind", ["loop", "sharded"])
def test_a_loop_of_ones_own_groups_heads_over_all_processes(kind, tmp_path) -> None:
    """Of different numbers of completions, in one of which processes none gains anything in the end."""
    ranks = run_two_processes(kind, tmp_path)
    assert [rank["world"] for rank in ranks] == [2, 2]
    policy = tiny_model("llama")
    parts = [
        measure_rollout(policy, Rollout(*rank["rollout"]), layers="all", horizon=(1, 4)) for rank in ranks
    ]
    assert [len(part.span) for part in parts] == [4, 3]
    heads = classify_heads(parts)
    weighed = CoupledRhythmCredit()(score_rollout(parts[0], heads, Rollout(*ranks[0]["rollout"])))
    for rank in ranks:
        assert rank["groups"]["local_heads"] == heads.local_heads.tolist()
        assert rank["groups"]["global_heads"] == heads.global_heads.tolist()
        assert rank["grouped_at"] == [0, 0, 2]
    for gamma in ranks[0]["gammas"]:
        torch.testing.assert_close(gamma, weighed)
    assert all(bool((gamma == 1).all()) for gamma in ranks[1]["gammas"])
    # Counted over both processes, so both know the same; seconds are a mean.
    first, second = ranks[0]["metrics"], ranks[1]["metrics"]
    assert [entry["credit/measured_rows"] for entry in first] == [7, 4, 7]
    assert [entry["credit/regrouped"] for entry in first] == [1, 0, 1]
    assert first[2]["credit/regrouped_heads"] == 0, "the policy did not change"
    assert first[0]["credit/gamma_mean"] == pytest.approx(float(weighed.double().mean()))
    for mine, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(
            torch.tensor(list(mine.values())), torch.tensor(list(theirs.values())), equal_nan=True
        )
    alone = [classify_heads(part) for part in parts]
    assert not all(torch.equal(each.local_heads, heads.local_heads) for each in alone)
    # Nobody trains by accident with heads of one's own, or waits for a process that makes no pass.
    refused = ranks[0]["refused"]
    assert "2 processes" in refused["group"]
    assert set(refused) == ({"group", "root"} if kind == "sharded" else {"group"})
