"""A stranger's checkpoint runs nothing of its own: no pickle is opened, no code of it imported.

Each process is watched twice. An audit hook, installed before the program begins, writes down what
Python opens, unpickles, imports and connects to. inotify says what is opened by any library,
whatever it is written in.
"""

import ctypes
import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.files.stage_table import OF_EVERY_RUN
from common.models.checkpoint import Checkpoint
from tests.conftest import DEMO, STAGES, run_script
from tests.refusals import expect
from tests.tiny_checkpoints import save_demo_lora

pytestmark = pytest.mark.slow
NUMBERS = [stage.number for stage in OF_EVERY_RUN]
COMPONENTS = {path.name: path for path in DEMO.iterdir() if path.is_dir()}
MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
LORA, EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
# Names under which diffusers, transformers, peft and the web UIs keep pickles.
PICKLE_NAMES = (
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.bin", "adapter_model.bin"),
    *("pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.bin", "model.fp16.bin"),
    *(f"{stem}-0000{k}-of-00002.bin" for stem in ("pytorch_model", "model") for k in (1, 2)),
    *(f"diffusion_pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)),
    *("model.ckpt", "model.pt", "model.pth", "pytorch_model.pt", "diffusion_pytorch_model.ckpt"),
    *("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"),
    *("rng_state.pth", "random_states_0.pkl", "tokenizer.pkl", "custom_checkpoint_0.pkl"),
    *(
        "pytorch_lora_weights.bin",
        "pytorch_lora_weights.pt",
        "pytorch_custom_diffusion_weights.bin",
    ),
    *("learned_embeds.bin", "learned_embeds.pt", "ip_adapter.bin"),
)
EVIL_MODULES = ("evil_module", "modeling_evil", "tokenization_evil", "pipeline_evil", "pipeline")
# The name of each shard index, and how its shards are called.
SHARD_INDEXES = {
    "pytorch_model.bin.index.json": "pytorch_model",
    "diffusion_pytorch_model.bin.index.json": "diffusion_pytorch_model",
    "diffusion_pytorch_model.bin.index.fp16.json": "diffusion_pytorch_model",
}
SITECUSTOMIZE = '''
"""Write down what this process opens, unpickles, imports and connects to."""

import json, os, sys

log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
root = os.environ["WATCH_ROOT"]
evil = set(os.environ["WATCH_MODULES"].split())

def note(*what):
    os.write(log, (json.dumps([str(part) for part in what]) + chr(10)).encode())

def hear(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(root):
            note(event, path)
    elif event == "import" and arguments[0].split(".")[0] in evil:
        note(event, arguments[0])
    elif event == "compile" and os.fsdecode(arguments[1] or b"").startswith(root):
        note(event, os.fsdecode(arguments[1]))
    elif event == "pickle.find_class" or event.startswith("socket."):
        note(event, *arguments)

sys.addaudithook(hear)
'''
# What only looks: a socket that is made, a name that is asked of the machine itself.
HARMLESS_SOCKET_EVENTS = ("socket.__new__", "socket.gethostname")


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Watch:
    """Runs programs with an eye on what they do; everything watched lies below `root`."""

    def __init__(self, root: Path, log: Path | None = None) -> None:
        """
        Args:
            log: where what is seen is written; for a second watch of a folder.
        """
        self.root, self.log = root, log or root / "log"
        self.marker, self.site = root / "MARKER", root / "site"
        if not self.site.exists():
            self.site.mkdir(parents=True)
            (self.site / "sitecustomize.py").write_text(SITECUSTOMIZE)
            # Where Python would find them, if anything asked for one.
            self.plant_modules(self.site)

    @property
    def pickle(self) -> bytes:
        return pickle.dumps(Evil(self.marker), protocol=2)

    def plant_modules(self, folder: Path) -> list[Path]:
        """Modules that make the marker when they are imported."""
        names = ("EvilClass", "EvilTokenizer", "CLIPTextModel")
        classes = "".join(f"class {name}: pass\n" for name in names)
        text = f"import os\nos.mkdir({str(self.marker)!r})\n{classes}"
        paths = [folder / f"{name}.py" for name in EVIL_MODULES]
        for path in paths:
            path.write_text(text)
        return paths

    def plant_pickles(self, folder: Path) -> list[Path]:
        """Pickles under all names that a library could look for, those that are taken left out."""
        paths = [folder / name for name in PICKLE_NAMES if not (folder / name).exists()]
        for path in paths:
            path.write_bytes(self.pickle)
        return paths

    def run(self, script: Path, *arguments: object, **options: object) -> Any:
        """Run a script with the hub's own switch off, so that nothing but ours keeps it offline."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
                patch.delenv(name, raising=False)
            patch.setenv("HF_HOME", str(self.root / "hf_home"))
            patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # what would be asked is not there
            patch.setenv("PYTHONPATH", str(self.site))
            patch.setenv("WATCH_LOG", str(self.log))
            patch.setenv("WATCH_ROOT", str(self.root))
            patch.setenv("WATCH_MODULES", " ".join(EVIL_MODULES))
            return run_script(script, *arguments, **options)

    def stage(self, number: int, *arguments: object, **options: object) -> Any:
        return self.run(STAGES[number], *arguments, **options)

    def events(self, *kinds: str) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event[0].startswith(kinds)]

    def opened(self) -> set[Path]:
        return {Path(path) for _, path in self.events("open")}

    def check_nothing_ran(self) -> None:
        """No marker, no pickle's class looked up, no planted module imported or compiled."""
        assert not self.marker.exists()
        assert self.events("pickle.find_class") == []
        assert self.events("import") == []
        assert self.events("compile") == []

    def check_no_network(self) -> None:
        """Nothing is looked up, connected to or sent; what is bound is the machine's own address.

        urllib3 binds a socket to ::1 as it is imported, to learn whether there is IPv6.
        """
        for name, *arguments in self.events("socket."):
            if name == "socket.bind":
                assert arguments[1] in ("('::1', 0)", "('127.0.0.1', 0)"), arguments
            else:
                assert name in HARMLESS_SOCKET_EVENTS, (name, arguments)


@contextmanager
def opened_by_anyone(root: Path) -> Iterator[set[Path]]:
    """The files below a folder that are opened meanwhile, as the kernel sees it."""
    in_open, in_isdir, in_q_overflow = 0x20, 0x40000000, 0x4000
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0
    folders = {
        libc.inotify_add_watch(queue, os.fsencode(folder), in_open): folder
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]
    }
    assert all(number > 0 for number in folders)
    found: set[Path] = set()
    yield found
    while True:
        try:
            content = os.read(queue, 1 << 20)
        except BlockingIOError:
            break
        offset = 0
        while offset < len(content):
            number, kind, _, length = struct.unpack_from("iIII", content, offset)
            offset += 16 + length
            assert not kind & in_q_overflow
            if not kind & in_isdir:
                name = content[offset - length : offset].rstrip(b"\0")
                found.add(folders[number] / os.fsdecode(name))
    os.close(queue)


def change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO, folder))


def plant_remote_code(watch: Watch, checkpoint: Path) -> list[Path]:
    """Modules beside all configs, and everything in the configs that could name them."""
    auto_map = {"AutoModel": "modeling_evil.EvilClass", "AutoConfig": "modeling_evil.EvilClass"}
    tokenizer = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    code = {"custom_pipeline": "pipeline_evil", "trust_remote_code": True}
    modules = watch.plant_modules(checkpoint)
    for name in COMPONENTS:
        modules += watch.plant_modules(checkpoint / name)
        for path in (checkpoint / name).glob("*config.json"):
            planted = tokenizer if name.startswith("tokenizer") else auto_map
            change_json(path, {"auto_map": planted, **code})
    extra = {"evil_part": ["evil_module", "EvilClass"], "auto_map": auto_map}
    change_json(checkpoint / "model_index.json", extra | code)
    return modules


def save_under_older_names(vae: Path) -> None:
    """Name the VAE's attention as diffusers once did, so that diffusers' own loader reads it."""
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        tensors = {name.replace(f".0.{new}.", f".0.{old}."): t for name, t in tensors.items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def save_embedding(file: Path) -> None:
    widths = {
        name: json.loads((DEMO / part / "config.json").read_text())["hidden_size"]
        for name, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
    }
    save_file({name: np.ones((1, width), "float32") for name, width in widths.items()}, file)


@dataclass
class HostileRun:
    """A whole run of a checkpoint in which everything that can be planted is."""

    watch: Watch
    checkpoint: Path
    loras: Path
    embeddings: Path
    run_dir: Path
    pickles: list[Path] = field(default_factory=list)
    modules: list[Path] = field(default_factory=list)
    results: list["subprocess.CompletedProcess[str]"] = field(default_factory=list)
    opened: set[Path] = field(default_factory=set)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> HostileRun:
    """All three stages with pickles and modules beside every file that they need."""
    root = tmp_path_factory.mktemp("hostile")
    watch = Watch(root / "watched")
    names = ("checkpoint", "loras", "embeddings")
    run = HostileRun(watch, *(watch.root / name for name in names), run_dir=root / "run")
    copy_demo(run.checkpoint)
    run.loras.mkdir()
    run.embeddings.mkdir()
    save_demo_lora(run.loras / LORA)
    save_embedding(run.embeddings / EMBEDDING)
    save_under_older_names(run.checkpoint / "vae")
    for folder in (run.checkpoint, *(run.checkpoint / name for name in COMPONENTS)):
        run.pickles += watch.plant_pickles(folder)
    for folder in (run.loras, run.embeddings):
        run.pickles += watch.plant_pickles(folder)
    for name in MODELS:
        for index, stem in SHARD_INDEXES.items():
            shards = {"weight": f"{stem}-00001-of-00002.bin"}
            (run.checkpoint / name / index).write_text(json.dumps({"weight_map": shards}))
    run.modules = plant_remote_code(watch, run.checkpoint)

    first = (
        *("--model_id", run.checkpoint, "--num_inference_steps", 2, "--prompt", "a <planted> star"),
        *("--lora", run.loras / LORA, "--embedding", f"{run.embeddings / EMBEDDING}:<planted>"),
    )
    with opened_by_anyone(watch.root) as run.opened:
        for number in NUMBERS:
            arguments = ("--output_dir", run.run_dir, *(first if number == 1 else ()))
            run.results.append(watch.stage(number, *arguments, cwd=run.checkpoint))
    return run


# --- the watch itself ----------------------------------------------------------------------------


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    """The pickle and the modules do make the marker, and nothing of it stays unseen."""
    import torch

    watch = Watch(tmp_path / "watched")
    planted = watch.root / "model.bin"
    planted.write_bytes(watch.pickle)
    pickle.loads(planted.read_bytes())
    watch.marker.rmdir()
    with pytest.raises(Exception, match=r"magic number|invalid|corrupt|NoneType"):
        torch.load(planted, weights_only=False)
    watch.marker.rmdir()

    script = tmp_path / "script.py"
    script.write_text(
        "import os, pickle, socket, sys\n"
        "pickle.load(open(sys.argv[1], 'rb'))\n"
        "os.rmdir(sys.argv[2])\n"
        "socket.getaddrinfo('localhost', 80)\n"
        "import evil_module\n"
    )
    with opened_by_anyone(watch.root) as opened:
        result = watch.run(script, planted, watch.marker)
    assert result.returncode == 0, result.stderr
    assert watch.marker.exists()
    assert planted in watch.opened() and planted in opened
    assert watch.events("pickle.find_class") == [["pickle.find_class", "posix", "mkdir"]]
    assert watch.events("import") == [["import", "evil_module"]]
    assert watch.events("compile") == [["compile", str(watch.site / "evil_module.py")]]
    with pytest.raises(AssertionError):
        watch.check_nothing_ran()
    with pytest.raises(AssertionError, match="getaddrinfo"):
        watch.check_no_network()


# --- planted beside what is needed ---------------------------------------------------------------


def test_the_stages_run_beside_what_is_planted(hostile: HostileRun) -> None:
    for result in hostile.results:
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    assert (hostile.run_dir / "output_image.png").exists()


def test_pickles_beside_safetensors_are_never_opened(hostile: HostileRun) -> None:
    assert len(hostile.pickles) > 250 and all(path.exists() for path in hostile.pickles)
    needed = {hostile.loras / LORA, hostile.embeddings / EMBEDDING} | {
        path for name in MODELS for path in (hostile.checkpoint / name).glob("*.safetensors")
    }
    assert len(needed) == 2 + len(MODELS) and needed <= hostile.opened
    assert hostile.checkpoint / "unet" / "config.json" in hostile.watch.opened()
    for opened in (hostile.opened, hostile.watch.opened()):
        assert not opened & set(hostile.pickles)
    hostile.watch.check_nothing_ran()


def test_a_stage_opens_what_its_fingerprint_counts_and_nothing_else(hostile: HostileRun) -> None:
    checkpoint = Checkpoint(str(hostile.checkpoint), hostile.checkpoint)
    counted = {path for name in COMPONENTS for path in checkpoint.files_read(name)}
    counted.add(hostile.checkpoint / "model_index.json")
    opened = {path for path in hostile.opened if path.is_relative_to(hostile.checkpoint)}
    assert opened == counted


def test_no_code_of_a_checkpoint_is_opened(hostile: HostileRun) -> None:
    assert len(hostile.modules) == len(EVIL_MODULES) * (1 + len(COMPONENTS))
    for opened in (hostile.opened, hostile.watch.opened()):
        assert not opened & set(hostile.modules)
    assert not {path for path in hostile.opened if path.suffix == ".py"} - {
        hostile.watch.site / "sitecustomize.py"
    }
    hostile.watch.check_nothing_ran()


def test_a_run_of_a_local_checkpoint_asks_nothing_of_the_network(hostile: HostileRun) -> None:
    assert all(result.returncode == 0 for result in hostile.results)
    hostile.watch.check_no_network()
    assert not (hostile.watch.root / "hf_home" / "hub").exists()


# --- named, or in the place of what is needed ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Arguments that name a pickle, and how a stage refuses them."""

    stage: int
    arguments: tuple[str, ...]  # {root}: the folder with checkpoint, loras, embeddings
    code: int
    words: tuple[str, ...]


def refusal(stage: int, *arguments: str, code: int, words: tuple[str, ...]) -> Any:
    label = " ".join(arguments).replace("{root}", "").replace("/", "-")
    return pytest.param(
        Refusal(stage=stage, arguments=arguments, code=code, words=words), id=f"{stage} {label}"
    )


@pytest.mark.parametrize(
    "case",
    [
        *(
            refusal(
                1, "--model_id", f"{{root}}/checkpoint/{name}", code=2, words=("--model_id", name)
            )
            for name in ("model.ckpt", "model.pt", "model.pth", "pytorch_model.bin")
        ),
        # From the working folder: it looks like ORGANISATION/NAME on the hub.
        refusal(1, "--model_id", "checkpoint/model.ckpt", code=2, words=("--model_id",)),
        refusal(1, "--unet", "{root}/checkpoint/unet/model.pt", code=2, words=("--unet",)),
        refusal(1, "--unet", "checkpoint/model.bin", code=2, words=("--unet",)),
        refusal(1, "--vae", "{root}/checkpoint/vae/model.ckpt", code=2, words=("--vae",)),
        refusal(2, "--unet", "{root}/checkpoint/unet/model.pth", code=2, words=("--unet",)),
        refusal(3, "--vae", "{root}/checkpoint/vae/model.bin", code=2, words=("--vae",)),
        refusal(1, "--lora", "{root}/loras/pytorch_lora_weights.bin", code=3, words=("--lora",)),
        refusal(1, "--lora", "loras/pytorch_lora_weights.pt:0.5", code=3, words=("--lora",)),
        refusal(2, "--lora", "{root}/loras/model.ckpt", code=3, words=("--lora",)),
        refusal(1, "--lora", "{root}/loras", code=3, words=("--lora",)),
        refusal(1, "--embedding", "{root}/embeddings/model.bin", code=3, words=("--embedding",)),
        refusal(1, "--embedding", "embeddings/model.pt:<a>", code=3, words=("--embedding",)),
        refusal(1, "--embedding", "{root}/embeddings", code=3, words=("--embedding",)),
    ],
)
def test_a_pickle_that_a_flag_names_is_refused(
    hostile: HostileRun, tmp_path: Path, case: Refusal
) -> None:
    root = hostile.watch.root
    watch = Watch(root, log=tmp_path / "log")
    arguments = [argument.replace("{root}", str(root)) for argument in case.arguments]
    folders: list[object] = ["--output_dir", tmp_path / "run"]
    if case.stage > 1:
        folders += ["--input_dir", hostile.run_dir]
    with opened_by_anyone(root) as opened:
        result = watch.stage(case.stage, *folders, *arguments, cwd=root)
    watch.check_nothing_ran()
    watch.check_no_network()
    assert not opened & set(hostile.pickles)
    expect(result, case.code, *case.words)


def without_safetensors(folder: Path, watch: Watch) -> list[Path]:
    """Pickles in the place of a component's safetensors, under all names."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return watch.plant_pickles(folder)


def in_shards(folder: Path, watch: Watch) -> list[Path]:
    """An index of safetensors shards that are pickles."""
    planted = without_safetensors(folder, watch)
    stem = "model" if folder.name.startswith("text") else "diffusion_pytorch_model"
    shards = {f"weight{k}": f"{stem}-0000{k}-of-00002.bin" for k in (1, 2)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return planted


@pytest.mark.parametrize(
    ("number", "component"), [(1, "text_encoder"), (1, "text_encoder_2"), (2, "unet"), (3, "vae")]
)
@pytest.mark.parametrize("plant", [without_safetensors, in_shards])
def test_pickles_in_the_place_of_weights_are_refused(
    hostile: HostileRun, tmp_path: Path, number: int, component: str, plant: Any
) -> None:
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    planted = plant(checkpoint / component, watch)
    folders = ("--input_dir", hostile.run_dir) if number > 1 else ()
    with opened_by_anyone(watch.root) as opened:
        result = watch.stage(
            number, *folders, "--output_dir", tmp_path / "run", "--model_id", checkpoint
        )
    watch.check_nothing_ran()
    watch.check_no_network()
    assert not opened & set(planted)
    expect(result, 3, component, "bin" if plant is in_shards else "safetensors")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_variant_of_pickles_alone_is_refused(
    hostile: HostileRun, tmp_path: Path, number: int
) -> None:
    watch = Watch(hostile.watch.root, log=tmp_path / "log")
    folders = ("--input_dir", hostile.run_dir) if number > 1 else ()
    with opened_by_anyone(watch.root) as opened:
        result = watch.stage(
            *(number, *folders, "--output_dir", tmp_path / "run", "--variant", "fp16"),
            *("--model_id", hostile.checkpoint),
        )
    watch.check_nothing_ran()
    assert not opened & set(hostile.pickles)
    expect(result, 2, "--variant fp16", "fp16.bin")


PICKLED = {
    "text_encoder": (1, "checkpoint/text_encoder/model.safetensors"),
    "lora": (1, "pickled.safetensors"),
    "embedding": (1, "pickled.safetensors"),
    "unet": (2, "checkpoint/unet/diffusion_pytorch_model.safetensors"),
    "vae": (3, "checkpoint/vae/diffusion_pytorch_model.safetensors"),
    "single file": (1, "pickled.safetensors"),
    "replaced unet": (2, "pickled.safetensors"),
}


@pytest.mark.parametrize(
    "what",
    [
        "text_encoder",
        "lora",
        *(pytest.param(what) for what in list(PICKLED)[2:]),
    ],
)
def test_a_pickle_under_the_name_of_safetensors_is_refused(
    hostile: HostileRun, tmp_path: Path, what: str
) -> None:
    """It is opened to be read as safetensors, and is not."""
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    number, name = PICKLED[what]
    (watch.root / name).write_bytes(watch.pickle)
    arguments: dict[str, tuple[object, ...]] = {
        "lora": ("--lora", watch.root / name),
        "embedding": ("--embedding", watch.root / name),
        "single file": ("--model_id", watch.root / name, "--single_file_config", checkpoint),
        "replaced unet": ("--model_id", checkpoint, "--unet", watch.root / name),
    }
    folders = ("--input_dir", hostile.run_dir) if number > 1 else ()
    result = watch.stage(
        *(number, *folders, "--output_dir", tmp_path / "run"),
        *arguments.get(what, ("--model_id", checkpoint)),
    )
    watch.check_nothing_ran()
    watch.check_no_network()
    expect(result, 3, Path(name).parent.name or name)


@pytest.mark.long
def test_a_variant_beside_pickles_runs_without_them(tmp_path: Path) -> None:
    """The weights are fp16's safetensors; all that is under the plain names is pickles."""
    watch = Watch(tmp_path / "watched")
    checkpoint, planted = copy_demo(watch.root / "checkpoint"), []
    for name in MODELS:
        for path in (checkpoint / name).glob("*.safetensors"):
            path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
        planted += watch.plant_pickles(checkpoint / name)
    first = ("--model_id", checkpoint, "--variant", "fp16", "--num_inference_steps", 2)
    with opened_by_anyone(watch.root) as opened:
        for number in NUMBERS:
            arguments = ("--output_dir", tmp_path / "run", *(first if number == 1 else ()))
            result = watch.stage(number, *arguments)
            assert result.returncode == 0, result.stderr
    assert not opened & set(planted)
    watch.check_nothing_ran()
    watch.check_no_network()


# --- code that a checkpoint names ----------------------------------------------------------------

EVIL_CLASS = ["evil_module", "EvilClass"]


@pytest.mark.parametrize(
    ("number", "changes", "word"),
    [
        (1, {"text_encoder_2": EVIL_CLASS}, "EvilClass"),
        (1, {"tokenizer": ["tokenization_evil", "EvilTokenizer"]}, "EvilTokenizer"),
        (2, {"unet": EVIL_CLASS}, "EvilClass"),
        (3, {"vae": EVIL_CLASS}, "EvilClass"),
        (1, {"_class_name": ["pipeline_evil", "EvilClass"]}, "pipeline_evil"),
        (1, {"_class_name": "EvilClass"}, "EvilClass"),
    ],
)
def test_a_class_of_the_checkpoints_own_is_refused(
    hostile: HostileRun, tmp_path: Path, number: int, changes: dict[str, Any], word: str
) -> None:
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    plant_remote_code(watch, checkpoint)
    change_json(checkpoint / "model_index.json", changes)
    folders = ("--input_dir", hostile.run_dir) if number > 1 else ()
    result = watch.stage(
        *(number, *folders, "--output_dir", tmp_path / "run", "--model_id", checkpoint),
        cwd=checkpoint,
    )
    watch.check_nothing_ran()
    expect(result, 2, word)


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_library_of_the_checkpoints_own_is_not_imported(tmp_path: Path, layout: str) -> None:
    """The class's name is a known one; the library that is to hold it is not."""
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    plant_remote_code(watch, checkpoint)
    named = {"text_encoder": ["evil_module", "CLIPTextModel"]}
    change_json(checkpoint / "model_index.json", named)
    model: tuple[object, ...] = ("--model_id", checkpoint)
    if layout == "single file":
        file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
        model = ("--model_id", file, "--single_file_config", checkpoint)
    result = watch.stage(1, "--output_dir", tmp_path / "run", *model, cwd=checkpoint)
    watch.check_nothing_ran()
    watch.check_no_network()
    expect(
        result, 2, "text_encoder is a CLIPTextModel of evil_module", "none of a checkpoint's own"
    )


def test_a_scheduler_of_the_checkpoints_own_is_refused(hostile: HostileRun, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    plant_remote_code(watch, checkpoint)
    change_json(checkpoint / "model_index.json", {"scheduler": EVIL_CLASS})
    change_json(checkpoint / "scheduler" / "scheduler_config.json", {"_class_name": "EvilClass"})
    result = watch.stage(
        *(2, "--input_dir", hostile.run_dir, "--output_dir", tmp_path / "run"),
        *("--model_id", checkpoint),
    )
    watch.check_nothing_ran()
    expect(result, 2, "EvilClass")


def test_an_attention_kernel_of_the_hub_is_not_fetched(tmp_path: Path) -> None:
    """transformers would download and run one that a config names."""
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    kernel = {"attn_implementation": "kernels-community/flash-attn3"}
    change_json(checkpoint / "text_encoder" / "config.json", kernel)
    result = watch.stage(1, "--output_dir", tmp_path / "run", "--model_id", checkpoint)
    watch.check_nothing_ran()
    watch.check_no_network()
    assert result.returncode == 0, result.stderr


def test_an_adapter_of_pickles_is_not_opened(tmp_path: Path) -> None:
    """transformers reads an adapter that stands in a text encoder's folder."""
    watch = Watch(tmp_path / "watched")
    checkpoint = copy_demo(watch.root / "checkpoint")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    adapter |= {"base_model_name_or_path": "someone/else", "task_type": None}
    (checkpoint / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    planted = watch.plant_pickles(checkpoint / "text_encoder")
    with opened_by_anyone(watch.root) as opened:
        result = watch.stage(1, "--output_dir", tmp_path / "run", "--model_id", checkpoint)
    watch.check_nothing_ran()
    watch.check_no_network()
    assert not opened & set(planted)
    expect(result, 3, "adapter_config.json", "--lora")
