"""The exports in the real llama.cpp: greedy, float32, the texts that ours gives.

    python -m pip download --no-deps --no-binary :all: llama-cpp-python     # carries llama.cpp
    tar xzf llama_cpp_python-*.tar.gz && cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-completion
    LLAMA_CPP=$PWD python -m pytest tests/test_llama_cpp.py                 # in this repository
"""
import copy
import os
from pathlib import Path

import pytest

from common import models
from common.sampling import sample
from conftest import python
from steer import band, extract_vector
from test_export import student
from tools import export

HERE = Path(os.environ.get("LLAMA_CPP", "llama.cpp"))
PROGRAM = HERE / "build" / "bin" / "llama-completion"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not PROGRAM.exists(), reason="needs LLAMA_CPP, a folder of llama.cpp with a build")]

PROMPTS = ["How do I boil an egg?", "Is it ever right to break a promise?"]


def converted(script, folder, file, *flags):
    """What llama.cpp's own converter makes of a folder of ours, in float32."""
    done = python(HERE / script, folder, "--outtype", "f32", "--outfile", file, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return file


def theirs(chat, model, *flags):
    """llama.cpp's greedy continuation of every prompt, keys and values in float32."""
    texts = []
    for prompt in PROMPTS:
        done = python(
            "-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", PROGRAM, "-m", model,
            "-p", chat.text(prompt), "-n", 16, "--temp", 0, "-c", 512, "-t", 1, "-fa", "off",
            "-ctk", "f32", "-ctv", "f32", "-no-cnv", "--no-display-prompt", "--no-warmup", *flags,
            stdin=open(os.devnull))
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(done.stdout.rstrip("\n").removesuffix(" [end of text]"))
    return texts


def ours(chat, model):
    """Our greedy continuation of every prompt."""
    answers = sample(model, chat, [chat.ids(p) for p in PROMPTS], max_new_tokens=16, temperature=0)
    return [chat.decode(tokens).rstrip("\n") for tokens in answers]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded model as a GGUF of float32."""
    file = tmp_path_factory.mktemp("llama") / "base.gguf"
    return converted("convert_hf_to_gguf.py", models.embedded_folder(), file)


def test_lora_and_merged_checkpoint_answer_as_the_student(embedded, base, tmp_path):
    model, chat = copy.deepcopy(embedded[0]), embedded[1]
    plain, healed = ours(chat, model), ours(chat, student(model, 2, size=0.03))
    assert theirs(chat, base) == plain != healed
    export.export_peft(model, tmp_path / "peft")
    adapter = converted("convert_lora_to_gguf.py", tmp_path / "peft", tmp_path / "lora.gguf",
                        "--base", models.embedded_folder())
    assert theirs(chat, base, "--lora", adapter) == healed
    export.export_merged(model, tmp_path / "merged")
    chat.tok.save_pretrained(tmp_path / "merged")
    file = converted("convert_hf_to_gguf.py", tmp_path / "merged", tmp_path / "merged.gguf")
    assert theirs(chat, file) == healed


def test_the_control_vector_answers_as_ours_at_every_position(embedded, base, tmp_path):
    model, chat = embedded
    pos, neg = ([chat.ids(prompt, persona) for prompt in PROMPTS]
                for persona in ("You care about people.", "You obey rank and rules."))
    vector = extract_vector(model, pos, neg, band(model, (0.45, 0.55)))
    export.export_gguf(vector, tmp_path / "v.gguf")
    for dose in (1.0, 4.0):
        with vector.at(model, dose):  # the prompt too, as llama.cpp does
            steered = ours(chat, model)
        flag = f"{tmp_path / 'v.gguf'}:{dose}"
        assert theirs(chat, base, "--control-vector-scaled", flag) == steered
    assert all(a != b for a, b in zip(ours(chat, model), steered))
