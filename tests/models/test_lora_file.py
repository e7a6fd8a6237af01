"""Of a right LoRA file one tensor is dropped, renamed, transposed, added or retyped.

The result is right, or a warning or an error names that tensor: nothing is silent.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from common.errors import BadInputFileError
from common.models.lora import plan_fusion
from common.models.lora_names import original_unet_name
from common.models.model_settings import LoraFile
from tests.in_process import Ours
from tests.models.lora_files import FORMATS, Format, MadeFile, full, ia3, make_file
from tests.tiny_checkpoints import save_sdxl

Tensors = dict[str, torch.Tensor]
WAYS = ("dropped", "renamed", "transposed", "added", "retyped")
OF_A_UNET = [kind for kind in FORMATS if "unet" in kind.modules]


class UNet:
    """A UNet's weights, and what a file makes of them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Ours(folder).checkpoint
        self.module: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.before = {name: t.detach() for name, t in self.module.named_parameters()}
        self.shapes = {
            ("unet", name.removesuffix(".weight")): tuple(t.shape)
            for name, t in self.before.items()
        }
        self.originals = {
            name: original_unet_name(name, self.module.config) or ""
            for name, _ in self.module.named_modules()
        }

    def make(self, kind: Format) -> MadeFile:
        made = make_file(kind, self.shapes, self.originals)
        made.tensors = {name: made.tensors[name] for name in made.tensors}
        return made

    def fused(self, tensors: Tensors, file: Path) -> dict[str, torch.Tensor]:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        fusion = plan_fusion("unet", self.module, self.checkpoint, [LoraFile(file=str(file))])
        return dict(fusion.fuse(iter(self.before.items()), torch.float32))

    def is_right(self, found: dict[str, torch.Tensor], made: MadeFile) -> bool:
        for name, before in self.before.items():
            expected = before.double().numpy()
            if ("unet", name) in made.deltas:
                expected = expected + made.deltas["unet", name](expected)
            if not np.allclose(found[name].double().numpy(), expected, atol=1e-5, rtol=1e-5):
                return False
        return True


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> UNet:
    return UNet(save_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))


def mutate(tensors: Tensors, way: str, generator: np.random.Generator) -> tuple[set[str], Tensors]:
    """One tensor of a file is no more what it was. Returns the names to be told, and the file."""
    names = sorted(tensors)
    if way == "transposed":  # a square one stays one that could be meant
        names = [name for name in names if tensors[name].shape != tensors[name].shape[::-1]]
    name = names[generator.integers(len(names))]
    told, changed = {name}, dict(tensors)
    tensor = changed.pop(name)
    if way == "renamed":
        at = generator.integers(len(name))
        renamed = f"{name[:at]}x{name[at:]}"
        told.add(renamed)
        changed[renamed] = tensor
    elif way == "transposed":
        changed[name] = tensor.permute(*range(tensor.ndim)[::-1])
    elif way == "added":
        changed[name] = tensor
        module = name.rpartition(".lora")[0] or name.rpartition(".")[0]
        name = f"{module}.{['scalar', 'lora_C.weight', 'oft_diag'][generator.integers(3)]}"
        told, changed[name] = {name}, torch.zeros(2, 2)
    elif way == "retyped":
        changed[name] = tensor.to(torch.int32)
    return told, changed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OF_A_UNET, ids=lambda kind: kind.title)
def test_one_tensor_that_is_not_as_it_was_is_named(
    unet: UNet, tmp_path: Path, kind: Format, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = unet.make(Format(kind.title, kind.names, kind.method, {"unet": kind.modules["unet"]},
                            kind.options, kind.varies))  # fmt: skip
    tensors = made.as_torch()
    assert unet.is_right(unet.fused(tensors, tmp_path / "right.safetensors"), made)
    capsys.readouterr()
    generator = np.random.default_rng(sum(map(ord, kind.title + way)))
    if way == "transposed" and kind.method is ia3:
        return  # it has no more than one axis
    for number in range(3):
        told, changed = mutate(tensors, way, generator)
        expected = copy.copy(made)
        if way == "dropped" and kind.method is full:
            # The file of a module less is as right a file.
            expected.deltas = _without(made, tensors, changed, unet)
        try:
            found = unet.fused(changed, tmp_path / f"{number}.safetensors")
        except BadInputFileError as error:
            assert any(name in str(error) for name in told), (told, str(error))
            continue
        said = capsys.readouterr().err
        assert any(name in said for name in told) or unet.is_right(found, expected), (told, said)


def _without(made: MadeFile, tensors: Tensors, changed: Tensors, unet: UNet) -> dict[Any, Any]:
    """What a file adds that lost its only tensor of a module, by the order in which both stand."""
    (gone,) = tensors.keys() - changed.keys()
    place = list(tensors).index(gone)
    keys = list(made.deltas)
    return {key: made.deltas[key] for k, key in enumerate(keys) if k != place}
