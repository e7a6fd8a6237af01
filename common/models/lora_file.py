"""A LoRA's file: what it does to which modules, all of it accounted for before a weight is read."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputFileError, in_one_line, listed
from common.models.lora_formulas import Method, method_of, missing_pieces
from common.models.lora_names import component_of, module_of, split_name
from common.models.tensor_files import FileHeader, TensorHeader, read_header
from common.text_files import parse_json, read_text

if TYPE_CHECKING:
    import torch

_BUNDLED = "bundle_emb."  # OneTrainer's textual inversions beside a LoRA
_SPELLED = (("lora_up", "lora_down"), ("lora_B", "lora_A"), (".up.", ".down."))
# Pieces that all of a file's modules usually have or lack, by what else these have.
_USUAL = (
    ("down", ("alpha", "dora_scale", "magnitude", "up_bias", "diff_b")),
    ("hada_w1_a", ("alpha", "dora_scale")),
    ("lokr", ("alpha", "dora_scale")),
    ("diff", ("diff", "diff_b")),
    ("norm", ("w_norm", "b_norm")),
)


@dataclass
class Module:
    """What a file has for one module of a model."""

    name: str  # in the file
    tensors: dict[str, str] = field(default_factory=dict)  # piece → tensor
    method: Method | None = None

    def spelled(self, piece: str) -> str:
        """The name that a tensor of a piece has, or would have."""
        if piece in self.tensors:
            return self.tensors[piece]
        for pair in (pair if piece == "down" else pair[::-1] for pair in _SPELLED):
            other = self.tensors.get({"down": "up", "up": "down"}.get(piece, ""), "")
            if pair[0] in other:
                return other.replace(*pair)
        suffix = {"mid": "lora_mid.weight", "up_bias": "lora_up.bias"}.get(piece, piece)
        return f"{self.name}.{suffix}"

    def spelled_as(self, piece: str, others: Iterable["Module"]) -> str:
        """The same, in the way of another module that has such a piece."""
        for other in others:
            if piece in other.tensors:
                return self.name + other.tensors[piece].removeprefix(other.name)
        return self.spelled(piece)


class LoraContent:
    """The content of a LoRA's file, and what a model makes of it.

    Raises:
        BadInputFileError: it is no safetensors file, damaged, or has a piece of a module twice.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, f"--lora {path}"
        self.header: FileHeader = read_header(path, self.said)
        self.modules: dict[str, Module] = {}
        self.others: list[str] = []  # tensors that are no piece of a module
        with_on_input = {name[: -len(".on_input")] for name in self.tensors if _on_input(name)}
        for name in self.tensors:
            split = split_name(name)
            if split is None and name.endswith(".weight") and name[:-7] in with_on_input:
                split = name[:-7], "weight"
            if split is None or component_of(name) is None:
                self.others.append(name)
                continue
            module = self.modules.setdefault(split[0], Module(split[0]))
            if split[1] in module.tensors:
                raise BadInputFileError(
                    f"{self.said} has {module.tensors[split[1]]} and {name} for one module: remove "
                    "one"
                )
            module.tensors[split[1]] = name

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """What the file says of its tensors."""
        return self.header.tensors

    def parts(self) -> set[str]:
        """The components that it changes."""
        return {str(component_of(name)) for name in self.modules}

    def fitting(
        self, component: str, names: Mapping[str, str]
    ) -> tuple[dict[str, Module], list[str]]:
        """The modules of a component that a model has, and the tensors that it has no place for.

        Args:
            names: of `names_in_files`.

        Raises:
            BadInputFileError: one of them lacks a tensor, has one of integers, or stands twice.
        """
        self._refuse_whole_weights(names)
        found: dict[str, Module] = {}
        unused: list[str] = []
        for module in self.modules.values():
            if component_of(module.name) != component:
                continue
            target = module_of(module.name, names)
            if target is None:
                unused += module.tensors.values()
                continue
            if target in found:
                raise BadInputFileError(
                    f"{self.said} has {found[target].name} and {module.name}, one module: "
                    "remove one"
                )
            found[target] = module
            unused += self._settle(module)
        return found, unused

    def _refuse_whole_weights(self, names: Mapping[str, str]) -> None:
        for name in self.others:
            module = name.removesuffix(".weight")
            if module != name and module_of(module, names) is not None:
                raise BadInputFileError(
                    f"{self.said} has {name}, which is a model's own weight, or lacks "
                    f"{module}.on_input of (IA)³: choose a LoRA"
                )

    def _settle(self, module: Module) -> list[str]:
        """Find a module's method. Returns the tensors that it has no use for."""
        pieces = frozenset(module.tensors)
        module.method = method_of(pieces)
        if module.method is None:
            missing = ", ".join(module.spelled(piece) for piece in missing_pieces(pieces))
            raise BadInputFileError(
                f"{self.said} lacks {missing} beside {min(module.tensors.values())}: get it again"
            )
        known = module.method.needs | module.method.may_have
        for piece, name in module.tensors.items():
            header = self.tensors[name]
            if piece in known and not _has_numbers(piece, header):
                raise BadInputFileError(
                    f"{self.said}: {name} is {header.dtype} {list(header.shape)}, which no "
                    f"{module.method.title} has: get it again"
                )
        unused = [name for piece, name in module.tensors.items() if piece not in known]
        for piece in pieces - known:
            del module.tensors[piece]
        return unused

    def warnings(self, modules: Mapping[str, Module], biases: Iterable[str]) -> list[str]:
        """What is read as it stands, though files seldom have it so.

        Args:
            modules: by the paths of the model's own.
            biases: the paths of those that have one.
        """
        with_bias, lacking, lines = set(biases), defaultdict(list), []
        for mark, usual in _USUAL:
            those = {
                path: module
                for path, module in modules.items()
                if any(mark in piece for piece in module.tensors)
            }
            for piece in usual:
                some = any(piece in module.tensors for module in those.values())
                if not some and (piece != "alpha" or self._is_pefts()):
                    continue
                for path, module in those.items():
                    needs_bias = piece in ("up_bias", "diff_b", "b_norm")
                    if piece not in module.tensors and (path in with_bias or not needs_bias):
                        lacking[piece].append(module.spelled_as(piece, those.values()))
        whole = [
            module.tensors["alpha"]
            for module in modules.values()
            if "alpha" in module.tensors
            and self.tensors[module.tensors["alpha"]].dtype.startswith(("I", "U"))
        ]
        alphas = sum("alpha" in module.tensors for module in modules.values())
        if 0 < len(whole) < alphas:
            lines.append(f"{self.said}: unlike the others, {listed(whole)} is a whole number")
        return lines + [
            f"{self.said} has no {listed(names)}: "
            + ("alpha is taken as the rank there" if piece == "alpha" else "read without")
            for piece, names in lacking.items()
        ]

    def _is_pefts(self) -> bool:
        """Whether alphas are not in the file by its layout, peft's and so diffusers'."""
        pieces = {piece: name for m in self.modules.values() for piece, name in m.tensors.items()}
        return "lora_down" not in pieces.get("down", "lora_down")

    def bundled(self) -> list[str]:
        """The textual inversions that stand beside a LoRA."""
        return sorted({n.split(".")[1] for n in self.others if is_bundled(n)})

    def scaling(self, module: Module, target: str, component: str, rank: int | None) -> float:
        """Alpha / rank of a module, by its own alpha or else by peft's config."""
        if rank is None:
            return 1.0
        if "alpha" in module.tensors:
            alpha = float(self.read([module.tensors["alpha"]])[module.tensors["alpha"]].reshape(()))
            if not math.isfinite(alpha):
                raise BadInputFileError(
                    f"{self.said}: {module.tensors['alpha']} is {alpha}: get it again"
                )
            return alpha / rank
        config = self._peft_config(component)
        if "lora_alpha" not in config:
            return 1.0
        alpha = float(config["lora_alpha"])
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(?:.*\.)?(?:{pattern})\Z", target):
                alpha = float(value)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _peft_config(self, component: str) -> dict[str, Any]:
        """peft's LoraConfig: of the file's metadata, as diffusers writes it, or beside the file."""
        text = self.header.metadata.get("lora_adapter_metadata")
        beside = self.path.with_name("adapter_config.json")
        try:
            if text is not None:
                every = parse_json(text)
                start = f"{component}."
                return {k.removeprefix(start): v for k, v in every.items() if k.startswith(start)}
            if self.path.name == "adapter_model.safetensors" and beside.is_file():
                found = parse_json(read_text(beside))
                return found if isinstance(found, dict) else {}
        except (ValueError, OSError, AttributeError) as error:
            raise BadInputFileError(
                f"{self.said}: its settings of peft cannot be read ({in_one_line(error)}): get it "
                "again"
            ) from None
        return {}

    def read(self, names: Sequence[str]) -> "dict[str, torch.Tensor]":
        """Some of its tensors, in float32."""
        return {name: self._opened.get_tensor(name).float() for name in names}

    @cached_property
    def _opened(self) -> Any:
        """The file, whose header is long: opened once for all modules."""
        from safetensors import safe_open

        return safe_open(self.path, "pt")

    def family(self) -> str | None:
        """The family that it was trained for, as its metadata say; None: they don't."""
        said = json.dumps(
            [
                self.header.metadata.get(key, "")
                for key in ("ss_base_model_version", "modelspec.architecture")
            ]
        ).lower()
        for pattern, family in (
            (r"sdxl|stable-diffusion-xl", "SDXL"),
            (r"sd_v2|stable-diffusion-v2", "SD 2.x"),
            (r"sd_v1|sd_1|stable-diffusion-v1", "SD 1.x"),
            (r"flux", "Flux"),
            (r"sd3|stable-diffusion-3", "SD 3"),
        ):
            if re.search(pattern, said):
                return family
        return None


def is_bundled(name: str) -> bool:
    """Whether a tensor is of a textual inversion that stands beside a LoRA."""
    return name.startswith(_BUNDLED)


def _on_input(name: str) -> bool:
    return name.endswith(".on_input")


def _has_numbers(piece: str, header: TensorHeader) -> bool:
    if piece in ("alpha", "on_input"):
        return math.prod(header.shape) == 1
    return header.dtype.startswith(("F", "BF")) and len(header.shape) > 0
