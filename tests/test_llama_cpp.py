"""The exports in the real llama.cpp: greedy, float32, the texts that ours gives.

    python -m pip download --no-deps --no-binary :all: llama-cpp-python     # carries llama.cpp
    tar xzf llama_cpp_python-*.tar.gz && cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-completion
    LLAMA_CPP=$PWD python -m pytest tests/test_llama_cpp.py                 # in this repository
"""
import os
from pathlib import Path

import pytest
import torch

from tools import export
import lora
from common import models
from conftest import python
from common.sampling import sample
from steer import Persona, band, chat_ids, chat_text, extract_vector

HERE = Path(os.environ.get("LLAMA_CPP", "llama.cpp"))
PROGRAM = HERE / "build" / "bin" / "llama-completion"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not PROGRAM.exists(), reason="needs LLAMA_CPP, a folder of llama.cpp with a build")]

PROMPTS = ["My boss told me to ignore a crying customer. What should I do?",
           "How do I boil an egg?", "Is it ever right to break a promise?"]
N = 16  # tokens


def converted(script, folder, file, *how):
    """What llama.cpp's own converter makes of a folder of ours, in float32."""
    done = python(HERE / script, folder, "--outtype", "f32", "--outfile", file, *how)
    assert done.returncode == 0, done.stderr[-2000:]
    return file


def says(tok, model, *how):
    """llama.cpp's greedy continuation of every prompt, keys and values in float32."""
    texts = []
    for prompt in PROMPTS:
        done = python(
            "-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", PROGRAM, "-m", model,
            "-p", chat_text(tok, prompt), "-n", N, "--temp", 0, "-c", 512, "-t", 1, "-fa", "off",
            "-ctk", "f32", "-ctv", "f32", "-no-cnv", "--no-display-prompt", "--no-warmup", *how,
            stdin=open(os.devnull))
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(done.stdout.rstrip("\n").removesuffix(" [end of text]"))
    return texts


def ours(model, tok):
    """Our greedy continuation of every prompt."""
    ids = [chat_ids(tok, prompt) for prompt in PROMPTS]
    said = sample(model, tok, ids, max_new_tokens=N, temperature=0)
    return [tok.decode(new).rstrip("\n") for new in said]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded model as a GGUF of float32."""
    file = tmp_path_factory.mktemp("llama") / "base.gguf"
    return converted("convert_hf_to_gguf.py", models.embedded_folder(), file)


@pytest.fixture
def student(embedded):
    """The embedded model with two folded rounds that change what it says."""
    model, tok = embedded
    torch.manual_seed(0)
    lora.attach(model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for m in lora.adapters(model).values():
            m.B.data = 0.15 * torch.randn(m.B.shape, generator=generator)
        lora.fold(model)
    with lora.gates(model, history=0):
        original = ours(model, tok)
    assert original != ours(model, tok), "the rounds must show"
    yield model, tok
    lora.detach(model)


def test_the_embedded_model_converts_and_says_the_same(embedded, base):
    assert says(embedded[1], base) == ours(*embedded)


def test_the_lora_says_what_the_student_says(student, base, tmp_path):
    model, tok = student
    export.export_peft(model, tmp_path / "peft")
    adapter = converted("convert_lora_to_gguf.py", tmp_path / "peft", tmp_path / "lora.gguf",
                        "--base", models.embedded_folder())
    assert says(tok, base, "--lora", adapter) == ours(model, tok)


def test_the_merged_checkpoint_says_what_the_student_says(student, tmp_path):
    model, tok = student
    export.export_merged(model, tmp_path / "merged")
    tok.save_pretrained(tmp_path / "merged")
    file = converted("convert_hf_to_gguf.py", tmp_path / "merged", tmp_path / "merged.gguf")
    assert says(tok, file) == ours(model, tok)


def test_the_control_vector_says_what_ours_does_when_every_position_is_steered(
        embedded, base, tmp_path):
    model, tok = embedded
    persona = Persona("You care about people and protect them.", "You obey rank and rules.")
    vector = extract_vector(model, tok, persona, PROMPTS, band(model, (0.45, 0.55)))
    export.export_gguf(vector, tmp_path / "v.gguf")
    plain, told = ours(model, tok), []
    for dose in (1.0, 2.0, 4.0):
        with vector.at(model, dose):
            steered = ours(model, tok)
        theirs = says(tok, base, "--control-vector-scaled", f"{tmp_path / 'v.gguf'}:{dose}")
        assert theirs == steered
        told.append(steered)
    assert all(a != b for a, b in zip(plain, told[-1]))
