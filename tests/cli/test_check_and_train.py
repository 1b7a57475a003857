"""What training would refuse before its first step, `fastpref check` refuses with the same words and exit code."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from tiny_project import MODEL

from fastpref.run.plan.software import is_recorded
from fastpref.trainer.ranks.transformer_engine import computes_here

peft = pytest.importorskip("peft", reason="peft, which writes the adapters, is not installed")

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 988097824\n"
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model, one in several files, a tied one, and an adapter of the first, as their makers write them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "shards", max_shard_size="8KB")
    LlamaForCausalLM(LlamaConfig(**MODEL, tie_word_embeddings=True)).save_pretrained(folder / "tied")
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).save_pretrained(
        folder / "adapter"
    )
    return folder


@pytest.fixture
def files(project: Path, models: Path, tokenizer_dir: Path) -> Path:
    """A project whose run starts from `model`, with all of `models` beside it to be spoilt."""
    for path in models.iterdir():
        shutil.copytree(path, project / path.name)
    text = (project / "run.yaml").read_text()
    start, stop = text.index("  config:"), text.index("data:")
    (project / "run.yaml").write_text(f"{text[:start]}  path: model\n{text[stop:]}")
    return project


def rename_tensors(path: Path, old: str, new: str) -> None:
    """Let the names of a file that begin with `old` begin with `new`."""
    save_file({re.sub(f"^{old}", new, name): tensor for name, tensor in load_file(path).items()}, path)


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of a file; `__` in a key stands for a dot."""
    content = load_file(path)
    for key, tensor in tensors.items():
        content.pop(key.replace("__", "."), None)
        if tensor is not None:
            content[key.replace("__", ".")] = tensor
    save_file(content, path)


def set_config(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def remove_shard(root: Path) -> None:
    sorted((root / "shards").glob("*.safetensors"))[1].unlink()


def move_shards(root: Path) -> None:
    folder = root / "shards"
    (folder / "weights").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "weights" / file.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": moved}))


def make_int8(root: Path) -> None:
    rewrite(root / "model" / "model.safetensors", **{UP.replace(".", "__"): torch.zeros(24, 16, dtype=torch.int8)})


def make_fp8(root: Path) -> None:
    weight = torch.zeros(24, 16).to(torch.float8_e4m3fn)
    rewrite(root / "model" / "model.safetensors", **{UP.replace(".", "__"): weight})


def only(root: Path, *names: str) -> None:
    """Empty `model` but for these files, which are made where they are not there."""
    for file in (root / "model").iterdir():
        if file.name not in names:
            file.unlink()
    for name in names:
        (root / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / "model" / name).exists():
            (root / "model" / name).write_bytes(b"{}")


def hold(root: Path, pid: int, host: str) -> None:
    (root / "out").mkdir()
    (root / "out" / "run.lock").write_text(json.dumps({"pid": pid, "host": host, "started": 1.0}))


def file_of(root: Path) -> Path:
    return root / "model" / "model.safetensors"


Break = Callable[[Path], object]
SHARDS, TIED, LORA = "model.path=shards", "model.path=tied", "lora={path: adapter, target_modules: [q_proj, v_proj]}"
CASES: dict[str, tuple[Break, tuple[str, ...], int, str]] = {
    # the model's files
    "no weights": (lambda r: only(r, "config.json"), (), 4, "model: has neither model.safetensors nor its index"),
    "missing shard": (remove_shard, (SHARDS,), 4, "names files that do not exist: model-00002-of"),
    "shards in a directory": (
        move_shards,
        (SHARDS,),
        4,
        "only .safetensors files beside the index are read; move them",
    ),
    "pointers": (
        lambda r: file_of(r).write_text(POINTER),
        (),
        4,
        "model.safetensors: is a git-lfs pointer of 86 bytes",
    ),
    "config pointer": (
        lambda r: (r / "model" / "config.json").write_text(POINTER),
        (),
        4,
        "config.json: is a git-lfs pointer of 86 bytes, not the file itself; run `git lfs install` and then `git lfs",
    ),
    "tokenizer pointer": (
        lambda r: (r / "model" / "tokenizer.json").write_text(POINTER),
        ("model.tokenizer=model",),
        4,
        "model/tokenizer.json: is a git-lfs pointer of 86 bytes",
    ),
    "cut": (lambda r: os.truncate(file_of(r), 9000), (), 4, "model.safetensors: has 9000 bytes, its header describes"),
    "int8": (
        make_int8,
        (),
        4,
        f"'{UP}' has dtype I8; only F64, F32, F16, BF16 weights can be trained on; take the model",
    ),
    "fp8": (make_fp8, (), 4, f"'{UP}' has dtype F8_E4M3; only"),
    "shape": (
        lambda r: rewrite(file_of(r), **{UP.replace(".", "__"): torch.zeros(16, 24)}),
        (),
        4,
        f"model: wrong shapes: {UP} is [16, 24], config.json says [24, 16]",
    ),
    "missing tensor": (
        lambda r: rewrite(file_of(r), model__norm__weight=None),
        (),
        4,
        "model: missing tensors: model.norm",
    ),
    "unexpected tensor": (
        lambda r: rewrite(file_of(r), v_head=torch.ones(1)),
        (),
        4,
        "model: unexpected tensors: v_head; if the model does not need them, load it with transformers and save it",
    ),
    "reward model": (
        lambda r: rewrite(file_of(r), lm_head__weight=None, score__weight=torch.ones(1, 16)),
        (),
        4,
        "model: missing tensors: lm_head.weight; unexpected tensors: score.weight ",
    ),
    "wrapped": (
        lambda r: rename_tensors(
            file_of(r), r"model\.layers\.(\d)", r"module.model.layers.\1._checkpoint_wrapped_module"
        ),
        (),
        4,
        "the names hold those of a wrapper, as DDP, FSDP and torch.compile use: save the model inside of it",
    ),
    "saved without its head": (
        lambda r: rename_tensors(r / "tied" / "model.safetensors", r"model\.", ""),
        (TIED,),
        4,
        "the names lack model. at their beginning: load it with transformers' AutoModelForCausalLM and save it",
    ),
    "empty tensors": (
        lambda r: rewrite(file_of(r), **{UP.replace(".", "__"): torch.zeros(0)}),
        (),
        4,
        "config.json says [24, 16]; DeepSpeed's ZeRO-3 leaves empty tensors where it saves without gathering",
    ),
    "untied without head": (
        lambda r: rewrite(file_of(r), lm_head__weight=None),
        (),
        4,
        "missing tensors: lm_head.weight; set tie_word_embeddings to true in config.json if the head is the embedding",
    ),
    "tied with another head": (
        lambda r: rewrite(r / "tied" / "model.safetensors", lm_head__weight=torch.ones(32, 16)),
        (TIED,),
        4,
        "tie_word_embeddings is true but lm_head.weight differs from model.embed_tokens.weight; set it to false",
    ),
    "vocabulary": (
        lambda r: set_config(r / "model" / "config.json", vocab_size=30),
        (),
        4,
        f"{EMBEDDING} is [32, 16], config.json says [30, 16], {HEAD} is [32, 16], config.json says [30, 16]; set "
        "vocab_size to 32 in config.json",
    ),
    "a model and an adapter": (
        lambda r: (r / "model" / "adapter_config.json").write_text("{}"),
        (),
        4,
        "model: holds a whole model and an adapter (adapter_config.json), which transformers would take instead",
    ),
    # something else in the model's place
    "hub name": (
        lambda r: None,
        ("model.path=Qwen/Qwen2.5-0.5B",),
        2,
        "if this is a name on the Hugging Face Hub, which is not asked here, run `hf download Qwen/Qwen2.5-0.5B "
        "--local-dir Qwen2.5-0.5B` and give Qwen2.5-0.5B",
    ),
    "hub name of data": (
        lambda r: None,
        ("data.train=org/pairs",),
        2,
        "if this is the name of a data set on a hub, save one of its splits as a file",
    ),
    "a file": (
        lambda r: None,
        ("model.path=model/model.safetensors",),
        2,
        "; give the directory that holds the file",
    ),
    "gguf": (
        lambda r: only(r, "a-q4.gguf"),
        (),
        4,
        "has no config.json: it holds weights in the form of GGUF (a-q4.gguf)",
    ),
    "gguf with a config": (lambda r: only(r, "config.json", "a.gguf"), (), 4, "it holds weights in the form of GGUF"),
    "pickles": (
        lambda r: only(r, "config.json", "pytorch_model.bin"),
        (),
        4,
        "it holds its weights as pickles (pytorch_model.bin), which can run any code when loaded; convert them",
    ),
    "trainer's state alone": (
        lambda r: only(r, "config.json", "rng_state_0.pth", "optimizer.bin", "random_states_0.pkl"),
        (),
        4,
        "model: has neither model.safetensors nor its index: found: config.json, optimizer.bin,",
    ),
    "shards without their index": (
        lambda r: (r / "shards" / "model.safetensors.index.json").unlink(),
        (SHARDS,),
        4,
        "its weights are in several files without their index, model.safetensors.index.json; download that, too",
    ),
    "another file name": (
        lambda r: file_of(r).rename(r / "model" / "model.fp16.safetensors"),
        (),
        4,
        "its weights have another name, model.fp16.safetensors; rename the file to model.safetensors",
    ),
    "link to nothing": (
        lambda r: file_of(r).unlink() or file_of(r).symlink_to("../../blobs/1f0c"),
        (),
        4,
        "it has links to files that do not exist: model.safetensors; download them again",
    ),
    "half a download": (
        lambda r: only(r, "config.json", ".cache/huggingface/download/1f0c.incomplete"),
        (),
        4,
        "it has files of a download that was not finished: 1f0c.incomplete; download the model again",
    ),
    "deepspeed": (
        lambda r: only(r, "config.json", "zero_to_fp32.py", "latest", "rng_state_0.pth"),
        (),
        4,
        "it is a checkpoint of DeepSpeed in parts; `python model/zero_to_fp32.py model DIR --safe_serialization` "
        "writes its weights; put config.json and the tokenizer beside them and give DIR",
    ),
    "consolidated": (
        lambda r: only(r, "consolidated.safetensors", "params.json"),
        (),
        4,
        "has no config.json: it holds weights in the form of their maker's own code (consolidated.safetensors)",
    ),
    "adapter as model": (
        lambda r: None,
        ("model.path=adapter",),
        4,
        "adapter has no config.json: it is an adapter; give it as lora.path, and its base model",
    ),
    "hub cache": (
        lambda r: None,
        ("model.path=..", "model.tokenizer=."),
        4,
        "has no config.json: directories inside it have one; give one of them:",
    ),
    "checkpoint as model": (
        lambda r: only(r, "MANIFEST.json", "state.json"),
        (),
        4,
        "it is a checkpoint of training; write its model with `fastpref export CONFIG --output DIR --checkpoint model`",
    ),
    "run as model": (
        lambda r: only(r, "checkpoints/step-2/MANIFEST.json"),
        (),
        4,
        "it is the output directory of a run; write its model with `fastpref export CONFIG --output DIR` and give DIR",
    ),
    "megatron": (
        lambda r: only(r, "latest_checkpointed_iteration.txt"),
        (),
        4,
        "has no config.json: it is a checkpoint of Megatron",
    ),
    "shards of megatron": (
        lambda r: only(r, "__0_0.distcp", "metadata.json"),
        (),
        4,
        "has no config.json: it is a checkpoint of Megatron",
    ),
    # adapters
    "model as adapter": (
        lambda r: None,
        ("lora={path: model}",),
        4,
        "model has no adapter_config.json: it is a whole model and no adapter; give it as model.path",
    ),
    "adapters inside": (
        lambda r: (r / "adapter").rename(r / "both") and (r / "both").rename(r / "b") and make_both(r),
        ("lora={path: both}",),
        4,
        "directories inside it have one; give one of them: both/reference, both/train",
    ),
    "adapter pickled": (
        lambda r: (r / "adapter" / "adapter_model.safetensors").rename(r / "adapter" / "adapter_model.bin"),
        (LORA,),
        4,
        "(adapter_model.bin), which can run any code when loaded; convert them in a sandbox with peft's",
    ),
    "adapter pointer": (
        lambda r: (r / "adapter" / "adapter_model.safetensors").write_text(POINTER),
        (LORA,),
        4,
        "adapter_model.safetensors: is a git-lfs pointer",
    ),
    "adapter of another base": (
        lambda r: set_config(r / "adapter" / "adapter_config.json", init_lora_weights="pissa"),
        (LORA,),
        4,
        "init_lora_weights 'pissa' is not supported",
    ),
    "adapter's targets": (lambda r: None, ("lora={path: adapter}",), 4, "set lora.target_modules to [q_proj, v_proj]"),
    # the reference
    "reference's weights": (
        lambda r: (
            rewrite(r / "tied" / "model.safetensors", model__norm__weight=None)
            or set_config(r / "tied" / "config.json", tie_word_embeddings=False)
        ),
        ("reference.path=tied",),
        4,
        "tied: missing tensors: model.norm.weight, lm_head.weight",
    ),
    "reference's architecture": (
        lambda r: None,
        ("reference.path=tied",),
        2,
        "reference.path: tie_embeddings must be the policy's, False, got True",
    ),
    "adapter as reference": (
        lambda r: None,
        ("reference.path=adapter",),
        4,
        "adapter has no config.json: it is an adapter",
    ),
    # where the run writes
    "no wandb": (
        lambda r: None,
        ("training.report_to=[wandb]",),
        2,
        'report_to "wandb" needs that package: pip install wandb',
    ),
    "output is a file": (lambda r: (r / "out").write_text(""), (), 2, "training.output_dir: 'out' exists and is not a"),
    "output in a file": (
        lambda r: (r / "out").write_text(""),
        ("training.output_dir=out/run",),
        2,
        "training.output_dir: 'out/run' lies in",
    ),
    "output held": (
        lambda r: hold(r, 7, "another-node"),
        (),
        4,
        "process 7 on another-node runs in out; wait for it or use another output_dir",
    ),
    "output held by a signature that is damaged": (
        lambda r: (r / "out").mkdir() or (r / "out" / "run.lock").write_text("{"),
        (),
        4,
        "out/run.lock cannot be read",
    ),
    "no checkpoint": (
        lambda r: None,
        ("training.resume_from_checkpoint=latest",),
        4,
        "no finished checkpoint under out",
    ),
    "no such checkpoint": (
        lambda r: None,
        ("training.resume_from_checkpoint=out/checkpoints/step-9",),
        4,
        "out/checkpoints/step-9 is no directory; name one of a checkpoint, or write latest",
    ),
    "a model as checkpoint": (
        lambda r: None,
        ("training.resume_from_checkpoint=model",),
        4,
        "model is no checkpoint of fastpref; give a model as model.path, an adapter as lora.path",
    ),
    # the model and the settings
    "balance without experts": (
        lambda r: None,
        ("training.moe_aux_loss_coeff=0.1",),
        2,
        "training.moe_aux_loss_coeff (0.1) balances experts, and llama has none; leave it out",
    ),
    "odd heads": (
        lambda r: set_config(r / "model" / "config.json", head_dim=3),
        (),
        2,
        "head_dim 3 must be even",
    ),
    # a precomputed reference
    "cache is a file": (
        lambda r: (r / "cache").write_text(""),
        ("reference={mode: precomputed, cache: cache}",),
        2,
        "reference.cache: 'cache' exists and is not a directory; choose another",
    ),
    "cache is something else": (
        lambda r: (r / "cache").mkdir(),
        ("reference={mode: precomputed, cache: cache}",),
        4,
        "cache is no reference cache: it has no MANIFEST.json",
    ),
    "warm-up": (lambda r: None, ("training.warmup_steps=3",), 2, "warm-up takes 3 of 3 steps"),
}


def make_both(root: Path) -> None:
    for name in ("train", "reference"):
        shutil.copytree(root / "b", root / "both" / name)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", CASES)
def test_check_says_what_train_says(files: Path, run_cli: Callable[..., Result], name: str) -> None:
    spoil, settings, code, message = CASES[name]
    spoil(files)
    results = [run_cli(command, "run.yaml", *settings) for command in ("check", "train")]
    for result in results:
        assert message in squeezed(result.stderr)
        assert result.exit_code == code
    assert results[0].stderr == results[1].stderr
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("key", ["training.output_dir", "reference.cache"])
def test_check_and_train_find_a_directory_that_cannot_be_written(
    files: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    access = os.access
    (files / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    settings = ("reference.mode=precomputed",) if key == "reference.cache" else ()
    results = [run_cli(command, "run.yaml", f"{key}=locked/new", *settings) for command in ("check", "train")]
    for result in results:
        assert result.exit_code == 2
        assert f"{key}: 'locked/new' cannot be written: Permission denied; change its permissions" in result.stderr
    assert results[0].stderr == results[1].stderr


@pytest.mark.parametrize("installed", [None, "2.7.0"])
def test_layers_that_cannot_be_built_are_refused_before_data_is_read(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    """On a machine with a GPU, whose Transformer Engine is not installed, or too old."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if installed is not None:
        for name in ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13"):
            (project / f"{name}-{installed}.dist-info").mkdir()
            record = f"Name: {name}\nVersion: {installed}\n"
            (project / f"{name}-{installed}.dist-info" / "METADATA").write_text(record)
        monkeypatch.syspath_prepend(project)
    elif is_recorded("transformer-engine") or computes_here():
        pytest.skip("Transformer Engine is installed")
    commands = ("check", "train", "eval", "score-ref")
    results = [run_cli(command, "run.yaml", "training.transformer_impl=transformer_engine") for command in commands]
    missing = "training.transformer_impl is transformer_engine, but it is not installed; install it with pip"
    for result in results:
        assert result.exit_code == 2 and result.stderr == results[0].stderr
        assert (missing if installed is None else "2.7.0 is installed, and at least 2.8 is needed") in result.stderr


def test_train_finds_that_a_disk_takes_no_directory(files: Path, run_cli: Callable[..., Result]) -> None:
    result = run_cli("train", "run.yaml", "training.output_dir=/proc/fastpref/out")
    assert result.exit_code == 2 and "training.output_dir: '/proc/fastpref/out' cannot be made" in result.stderr


def test_check_leaves_nothing_behind(files: Path, run_cli: Callable[..., Result]) -> None:
    hold(files, 0, socket.gethostname())  # a dead process's
    before = sorted(files.rglob("*"))
    assert run_cli("check", "run.yaml", LORA, "reference.path=shards", "lora.r=8").exit_code == 0
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "remedy", "settings"),
    [
        ("untied without head", {"tie_word_embeddings": True}, ()),
        ("vocabulary", {"vocab_size": 32}, ()),
    ],
)
def test_remedy_in_the_config_works(
    files: Path, run_cli: Callable[..., Result], spoil: str, remedy: dict, settings: tuple[str, ...]
) -> None:
    CASES[spoil][0](files)
    set_config(files / "model" / "config.json", **remedy)
    for command in ("check", "train"):
        result = run_cli(command, "run.yaml", *settings)
        assert result.exit_code == 0, result.stderr


def test_remedy_for_a_checkpoint_of_fsdp_works(files: Path, run_cli: Callable[..., Result]) -> None:
    merge = pytest.importorskip("accelerate.utils").merge_fsdp_weights
    parts = files / "model" / "pytorch_model_fsdp_0"
    torch.distributed.checkpoint.save({"model": load_file(file_of(files))}, checkpoint_id=parts, no_dist=True)
    file_of(files).unlink()
    message = squeezed(run_cli("check", "run.yaml").stderr)
    assert "it is a checkpoint of FSDP in parts; `accelerate merge-weights model/pytorch_model_fsdp_0 DIR`" in message
    merge(str(parts), "whole")
    shutil.copy("model/config.json", "whole")
    assert run_cli("check", "run.yaml", "model.path=whole").exit_code == 0


@pytest.mark.parametrize(("spoil", "folder"), [("unexpected tensor", "model"), ("saved without its head", "tied")])
def test_transformers_saves_what_it_was_to_save_anew(
    files: Path, run_cli: Callable[..., Result], spoil: str, folder: str
) -> None:
    from transformers import AutoModelForCausalLM

    before = load_file(files / folder / "model.safetensors")
    CASES[spoil][0](files)
    AutoModelForCausalLM.from_pretrained(files / folder).save_pretrained("again")
    assert run_cli("check", "run.yaml", "model.path=again").exit_code == 0
    again = load_file("again/model.safetensors")
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_remedy_for_a_run_given_as_a_model_works(project: Path, run_cli: Callable[..., Result]) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    step = "out/checkpoints/step-1"
    for given, options in ((step, ["--checkpoint", step]), ("out", [])):
        other = ("model.config=null", f"model.path={given}", "training.output_dir=other")
        message = squeezed(run_cli("check", "run.yaml", *other).stderr)
        command = " ".join(["fastpref", "export", "CONFIG", "--output", "DIR", *options])
        assert f"write its model with `{command}` and give DIR" in message
        folder = f"model-{len(options)}"
        assert run_cli("export", "run.yaml", "--output", folder, *options).exit_code == 0
        assert run_cli("check", "run.yaml", *other[:1], f"model.path={folder}", other[2]).exit_code == 0


# --- going on


@pytest.fixture(scope="module")
def first_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the output of a run of one step is kept, once a test has made it."""
    return tmp_path_factory.mktemp("first-step") / "out"


@pytest.fixture
def stopped(project: Path, run_cli: Callable[..., Result], first_step: Path) -> Path:
    """A project with a run of one step."""
    if not first_step.exists():
        assert run_cli("train", "run.yaml", "training.max_steps=1", "lora.r=2").exit_code == 0
        shutil.copytree("out", first_step)
    shutil.copytree(first_step, "out", dirs_exist_ok=True)
    return project


RESUMED = ("training.max_steps=1", "lora.r=2", "training.resume_from_checkpoint=latest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("training.seed=7",), "seed: saved 42, now 7. Use the saved settings or start a new run"),
        (("training.max_steps=2",), "total_steps: saved 1, now 2. Use"),
        (("lora.r=4",), "lora.r: saved 2, now 4"),
        (("model.config.rms_norm_eps=0.5",), "model.norm_eps: saved 1e-06, now 0.5"),
        (("loss.beta=0.3",), "set resume_allow_changes: [loss]"),
        (("data.train=held_out.jsonl",), "num_train_pairs: saved 10, now 4"),
    ],
)
def test_check_compares_a_checkpoint_with_the_run(
    stopped: Path, run_cli: Callable[..., Result], settings: tuple[str, ...], message: str
) -> None:
    results = [run_cli(command, "run.yaml", *RESUMED, *settings) for command in ("check", "train")]
    for result in results:
        assert result.exit_code == 4
        assert message in squeezed(result.stderr)
    assert results[0].stderr == results[1].stderr
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "settings", [(), ("loss.beta=0.3", "training.resume_allow_changes=[loss]"), ("data.eval=pairs.jsonl",)]
)
def test_check_and_train_go_on(stopped: Path, run_cli: Callable[..., Result], settings: tuple[str, ...]) -> None:
    for command in ("check", "train"):
        result = run_cli(command, "run.yaml", *RESUMED, *settings)
        assert result.exit_code == 0, result.stderr


def test_check_sees_that_files_of_a_checkpoint_are_missing(stopped: Path, run_cli: Callable[..., Result]) -> None:
    (stopped / "out" / "checkpoints" / "step-1" / "common.pt").unlink()
    results = [run_cli(command, "run.yaml", *RESUMED) for command in ("check", "train")]
    for result in results:
        assert result.exit_code == 4
        assert "out/checkpoints/step-1 is damaged: common.pt is missing" in squeezed(result.stderr)


def test_checkpoint_of_experts_fits_its_own_run(project: Path, run_cli: Callable[..., Result]) -> None:
    """The weight of the load-balancing loss is the model's, or the run's."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    model = json.dumps({**MODEL, **experts, "model_type": "qwen3_moe", "head_dim": 4})
    for coefficient in ("null", "0.5"):
        settings = (f"model.config={model}", f"training.moe_aux_loss_coeff={coefficient}", "training.max_steps=1")
        settings += (f"training.output_dir=out-{coefficient}",)
        assert run_cli("train", "run.yaml", *settings).exit_code == 0
        again = (*settings, "training.resume_from_checkpoint=latest")
        assert run_cli("check", "run.yaml", *again).exit_code == 0
        other = run_cli("check", "run.yaml", *again, "training.moe_aux_loss_coeff=0.25")
        assert other.exit_code == 4 and "now 0.25" in other.stderr
