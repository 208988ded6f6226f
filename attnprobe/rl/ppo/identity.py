"""Identity: what makes a PPO run the same run, as text by name, and how two of them differ.

`PPO` computes its own when it is made; checkpoints hold it, and `checkpoint.restore` refuses to continue a
run whose identity is another. It names each fact that the next step depends on and that a checkpoint does
not bring along: settings, credit, end tokens, the content of the problems, and the model's architecture and
parameters. Not in it: weights, which the checkpoint holds; the reward, since functions cannot be compared;
and the evaluation, which changes nothing. What is left to others: what else a checkpoint holds (checkpoint).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attnprobe.adapters.base import display_name
from attnprobe.rl.scoring import bare_policy
from attnprobe.validation import is_array

Identity = dict[str, dict[str, str]]
"""Facts by name, in sections: "settings", "problems", "architecture" and "parameters"."""

FREE = ("steps", "checkpoint_every")
"""Settings that a resumed run may change: it is still the same run, only longer or saved more often."""

_NOT_ARCHITECTURE = frozenset(
    {
        "transformers_version", "torch_dtype", "dtype", "use_cache", "return_dict", "output_attentions",
        "output_hidden_states", "architectures", "problem_type", "id2label", "label2id", "pad_token_id",
        "bos_token_id", "eos_token_id", "base_model_name_or_path", "inference_mode", "revision",
        "peft_version",
    }
)  # fmt: skip
"""What configs hold besides the function that a model computes. Dtypes are compared with the parameters."""


_PLAIN = {int, float, str, bool, type(None)}


def identity_of(ppo: Any) -> Identity:
    """Return what identifies a `PPO` run."""
    settings = dataclasses.asdict(ppo.config)
    return {
        "settings": {
            **{name: repr(value) for name, value in settings.items() if name not in FREE},
            **({"credit": "None"} if ppo.credit is None else ppo.credit.settings()),
            "ends": repr(sorted(ppo.ends)),
        },
        "problems": _of_problems(ppo.problems),
        "architecture": _of_architecture(ppo.model.policy),
        "parameters": _of_parameters(ppo.model),
    }


def differences(saved: Identity, ours: Identity, shown: int = 3) -> list[str]:
    """Return how our identity differs from a saved one, as texts such as "epochs=2 (not 3)".

    Of the parameters that differ, only the first few are told: often all of them do.

    >>> differences({"settings": {"epochs": "2", "seed": "0"}}, {"settings": {"epochs": "3", "seed": "0"}})
    ['epochs=2 (not 3)']
    """
    told = []
    for section in {**saved, **ours}:
        left, right = saved.get(section, {}), ours.get(section, {})
        names = sorted(name for name in {**left, **right} if left.get(name) != right.get(name))
        if section == "architecture":
            # Another version of transformers may know more settings of an architecture, or fewer.
            names = [name for name in names if name in left and name in right]
        if "credit" in names:
            # Another strategy has other parameters, which say no more than its name.
            names = [name for name in names if not name.startswith("credit.")]
        listed = names[:shown] if section == "parameters" else names
        told += [f"{name}={left.get(name, 'none')} (not {right.get(name, 'none')})" for name in listed]
        if len(names) > len(listed):
            told.append(f"{len(names) - len(listed)} more {section} that differ")
    return told


def _of_problems(problems: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return how many problems there are, and a digest of each of their entries over all of them."""
    count, digests = 0, dict[str, hashlib.blake2b]()
    for problem in problems:
        for name, value in problem.items():
            digest = digests.setdefault(str(name), hashlib.blake2b(digest_size=6))
            digest.update(f"{count}:".encode())
            digest.update(_content(value).encode())
        count += 1
    contents = {f"problems' {name}": f"contents {digest.hexdigest()}" for name, digest in digests.items()}
    return {"number of problems": str(count), **contents}


def _content(value: Any) -> str:
    """Return a value as a text, the same in any process, and for a list, a tuple, an array or a tensor.

    >>> import torch
    >>> [_content(value) for value in ((1, 2), torch.tensor([1, 2]), {"b": len, "a": {2}})]
    ['[1, 2]', '[1, 2]', "{'a': {2}, 'b': <built-in function len>}"]
    """
    if isinstance(value, Tensor) or is_array(value):
        value = value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        pairs = sorted((repr(name), _content(each)) for name, each in value.items())
        return "{" + ", ".join(f"{name}: {each}" for name, each in pairs) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_content, value))) + "}"
    if isinstance(value, list | tuple | range):
        # Prompts have thousands of ids: their repr is many times faster than a call for each.
        if {type(each) for each in value} <= _PLAIN:
            return repr(list(value))
        return "[" + ", ".join(map(_content, value)) + "]"
    # The repr of a function, and of an object without a repr of its own, ends with its address.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _of_architecture(policy: Any) -> dict[str, str]:
    """Return the kind of a policy, and the settings in its config and in that of its adapters."""
    bare = bare_policy(policy)
    found = {"model": f"{type(bare).__name__} {display_name(bare)}"}
    adapters = {f"adapter {name}": config for name, config in getattr(policy, "peft_config", {}).items()}
    configs = {"config": bare.config, **adapters}
    for source, config in configs.items():
        for name, value in config.to_dict().items():
            if name not in _NOT_ARCHITECTURE and not name.startswith("_"):
                found[f"{source}.{name}"] = _content(value)
    return found


def _of_parameters(model: Any) -> dict[str, str]:
    """Return the dtype and shape of each parameter and buffer, and whether it is trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, "
        f"{'trained' if name in trained else 'not trained'}"
        for name, value in model.state_dict().items()
    }
