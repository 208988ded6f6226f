"""What `report`, `heads` and `score` are asked: their common options, and the checks before a model is
loaded.

`with_common_options` gives a command the fields of `Asked` as options. `Asked.check` refuses what can be
refused without a model, by the name of the option. What is left to others: options of a single command
(commands).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from attnprobe.command_line import AUTO, check_place, usage
from attnprobe.errors import BatchError, ParameterError
from attnprobe.layer_selection import parse_layers
from attnprobe.validation import real_number, whole_number

DEMO_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
DEMO_PROMPT = (
    "Ben buys 4 notebooks for 3 dollars each and 2 pens for 2 dollars each. He pays with a 20 dollar "
    "bill. How much change does he get?"
)

_MODEL, _ANSWER, _MEASURING = "Model", "Prompt and answer", "Measuring"

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A hub name, a folder or a GGUF file.",
        show_default="the packaged SmolLM2",
        rich_help_panel=_MODEL,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where it runs: cpu, cuda, cuda:1; auto: a GPU if there is one.", rich_help_panel=_MODEL
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Its numbers: float32, bfloat16, float16; auto: as saved on a GPU, float32 on a CPU.",
        rich_help_panel=_MODEL,
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(help="What to ask.", show_default="a built-in word problem", rich_help_panel=_ANSWER),
]
PromptFileOption = Annotated[
    Path | None,
    typer.Option(help="A file with what to ask; - is standard input.", rich_help_panel=_ANSWER),
]
SystemOption = Annotated[
    str | None,
    typer.Option(
        help="The system message, in a chat.", show_default="reason step by step", rich_help_panel=_ANSWER
    ),
]
ResponseOption = Annotated[
    str | None,
    typer.Option(
        help="Read this answer instead of generating one.", show_default=False, rich_help_panel=_ANSWER
    ),
]
ResponseFileOption = Annotated[
    Path | None,
    typer.Option(help="A file with the answer to read; - is standard input.", rich_help_panel=_ANSWER),
]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Use the chat template.",
        show_default="if there is one",
        rich_help_panel=_ANSWER,
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, help="The longest answer to generate.", rich_help_panel=_ANSWER)
]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.", rich_help_panel=_ANSWER)
]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling.", rich_help_panel=_ANSWER)]
LayersOption = Annotated[
    str,
    typer.Option(
        help='"all", "middle", "top third", or numbers such as 0,4,8-11.', rich_help_panel=_MEASURING
    ),
]
QuantileOption = Annotated[
    float,
    typer.Option(help="The share of heads in the local and the global group.", rich_help_panel=_MEASURING),
]
HeadSpanOption = Annotated[
    str,
    typer.Option(
        help='How heads are ranked: by their "plain" span, or "ignoring" the first token.',
        rich_help_panel=_MEASURING,
    ),
]
GroupsOption = Annotated[
    Path | None,
    typer.Option(
        help="Head groups saved by `heads -o`; default: those of this answer.",
        show_default=False,
        rich_help_panel=_MEASURING,
    ),
]
WindowOption = Annotated[
    int, typer.Option(min=1, help="WAAD's window, in tokens.", rich_help_panel=_MEASURING)
]
HorizonOption = Annotated[
    str, typer.Option(help='FAI\'s horizon, in tokens; "10,end" runs to the end.', rich_help_panel=_MEASURING)
]


@dataclass(frozen=True)
class Asked:
    """The options that `report`, `heads` and `score` have in common."""

    model: ModelOption = None
    device: DeviceOption = AUTO
    dtype: DtypeOption = AUTO
    prompt: PromptOption = None
    prompt_file: PromptFileOption = None
    system: SystemOption = DEMO_SYSTEM
    response: ResponseOption = None
    response_file: ResponseFileOption = None
    chat: ChatOption = None
    max_new_tokens: MaxNewTokensOption = 256
    temperature: TemperatureOption = 0.0
    seed: SeedOption = 0
    layers: LayersOption = "all"
    quantile: QuantileOption = 0.3
    head_span: HeadSpanOption = "plain"

    def check(self, *, groups: Path | None = None, window: int = 10, horizon: Any = (10, 100)) -> Checked:
        """Return everything that can be known before a model is loaded.

        Raises:
            typer.BadParameter: what makes no sense, by the option's name.
            MissingDependencyError: a GGUF file without the `gguf` extra.
        """
        from attnprobe.head_groups import HeadGroups
        from attnprobe.heads import check_shares
        from attnprobe.models import model_name

        if str(self.prompt_file) == str(self.response_file) == "-":
            raise typer.BadParameter(
                "standard input holds only one text: give the other as an option or a file",
                param_hint="--response-file",
            )
        with usage("--layers"):
            layers = parse_layers(self.layers)
        if self.head_span not in ("plain", "ignoring"):
            raise typer.BadParameter('it is "plain" or "ignoring"', param_hint="--head-span")
        if groups is not None and self.head_span != "plain":
            raise typer.BadParameter(
                "saved groups are used as they are: heads are not ranked", param_hint="--head-span"
            )
        with usage("--quantile"):
            check_shares(self.quantile, receivers=1)
        with usage("--temperature"):
            real_number(self.temperature, "the temperature", minimum=0, below=float("inf"))
        with usage("--seed"):
            whole_number(self.seed, "the seed", minimum=-(2**63), maximum=2**63 - 1)
        with usage("--model"):
            name = model_name(self.model)
        device, dtype = check_place(self.device, self.dtype)
        saved = None
        if groups is not None:
            with usage("--groups"):
                saved = HeadGroups.load(groups)
                # What a name such as "middle" stands for, only the model can say.
                known = saved.layers if isinstance(layers, str) else tuple(layers)
                saved.check_fits(known, None, name)
        response = _text(self.response, self.response_file, "response")
        for name in ("max_new_tokens", "temperature", "seed"):
            if response is not None and getattr(self, name) != type(self).__dict__[name]:
                raise typer.BadParameter(
                    "a response is given, and is read as it is: nothing is generated",
                    param_hint=f"--{name.replace('_', '-')}",
                )
        return Checked(
            asked=self,
            layers=layers,
            groups=saved,
            window=window,
            horizon=horizon,
            device=device,
            dtype=dtype,
            prompt=_text(self.prompt, self.prompt_file, "prompt") or DEMO_PROMPT,
            response=response,
        )


@dataclass(frozen=True)
class Checked:
    """What was asked, in the form in which the library takes it."""

    asked: Asked
    layers: Any
    groups: Any
    window: int
    horizon: Any
    device: Any
    dtype: Any
    prompt: str
    response: str | None


def _text(given: str | None, path: Path | None, name: str) -> str | None:
    """Return a text that was given as it is or in a file; None if neither was."""
    option = f"--{name}"
    if path is not None:
        if given is not None:
            raise typer.BadParameter(f"{option} and {option}-file are two texts: give one", param_hint=option)
        option += "-file"
        with usage(option):
            given = _read_text(path)
    if given is None:
        return None
    with usage(option):
        if not given.strip():
            missing = "token to describe" if name == "response" else "question"
            raise BatchError(f"the {name} is empty: there is no {missing}")
    return given


def _read_text(path: Path) -> str:
    """Return the text of a file, or of standard input, without the line break that ends it."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror}") from error
    return text.removesuffix("\n").removesuffix("\r")


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is `asked`, the fields of `Asked` as options of its own."""
    common = get_type_hints(Asked, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    names = [each.name for each in fields(Asked)]

    @wraps(command)
    def called(**options: Any) -> None:
        asked = Asked(**{name: options.pop(name) for name in names})
        command(asked, **options)

    parameters = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=common[each.name]
        )
        for each in fields(Asked)
    ]
    for parameter in list(inspect.signature(command).parameters.values())[1:]:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(parameter.replace(kind=kind, annotation=own[parameter.name]))
    # typer reads both; without them it would see the command's own parameters.
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del called.__wrapped__
    return called
