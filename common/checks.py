"""The one gate that every command calls (provisional: branch `models` replaces this file)."""
from common import models
from common.prompts import DATE, Chat


def load(name, device="auto", dtype="auto", date=DATE):
    model, tok = models.load(name, device, dtype)
    return model, Chat(tok, date)
