"""What a single file says of its model beside the weights, as values of diffusers' configs.

Some tools mark what a UNet was trained for by tensors of their own: `v_pred` and `ztsnr`
(prediction type, zero terminal SNR), `edm_mean` and `edm_std` (Playground v2.5's latents),
`edm_vpred.sigma_max` (CosXL). Others say it in the file's metadata (`modelspec.prediction_type`,
https://github.com/Stability-AI/ModelSpec), against which the tensors win. The configs that stand
beside such a file may say otherwise; the file, which was trained so, is right.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.models.tensor_files import read_header

# The sampling of EDM (Karras et al. 2022), as Playground v2.5 and CosXL were published with it.
_EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002}
_PLAYGROUND = {**_EDM, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
_COSXL = {**_EDM, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
FLAGS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

_MODEL_SPEC = "modelspec.prediction_type"
_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}

Configs = Mapping[str, Mapping[str, Any]]  # component → values


def configs_in_file(path: Path, said: str) -> tuple[list[str], Configs]:
    """The flags in a file, and the values of which components' configs they stand for.

    Raises:
        BadInputFileError: it is no safetensors file, or a flag's tensor is none of numbers.
    """
    status = path.stat()
    return _read(path, said, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, said: str, *_: int) -> tuple[list[str], Configs]:
    header = read_header(path, said)
    flags = [name for name in FLAGS if name in header.tensors]
    scheduler: dict[str, Any] = {}
    vae: dict[str, Any] = {}
    prediction_type = _PREDICTION_TYPES.get(header.metadata.get(_MODEL_SPEC, ""))
    if prediction_type is not None and not flags:
        return [_MODEL_SPEC], {"scheduler": {"prediction_type": prediction_type}, "vae": {}}
    if "v_pred" in flags:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in flags:
        scheduler["rescale_betas_zero_snr"] = True
    values = _numbers(path, [name for name in flags if name.startswith("edm_")])
    if "edm_vpred.sigma_max" in flags:
        scheduler |= _COSXL | {
            name.partition(".")[2]: values[name][0]
            for name in ("edm_vpred.sigma_max", "edm_vpred.sigma_min")
            if name in values
        }
    elif "edm_mean" in flags and "edm_std" in flags:
        scheduler |= _PLAYGROUND
        vae |= {"latents_mean": values["edm_mean"], "latents_std": values["edm_std"]}
    return flags, {"scheduler": scheduler, "vae": vae}


def _numbers(path: Path, names: list[str]) -> dict[str, list[float]]:
    if not names:
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().flatten().tolist() for name in names}
