"""The stage `bundle`: all an app needs to run what ships, in one folder that can be copied or uploaded as it is."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from llamaq.config import Component, Config
from llamaq.config.view import only
from llamaq.data.tokenizer import copy_tokenizer, tokenizer_of
from llamaq.export.bundle_tokenizer import is_tiktoken, write_tokenizer
from llamaq.model.shape import shape_of
from llamaq.runs.files import sha256_file
from llamaq.runs.ranks import from_rank_zero, on_rank_zero, say
from llamaq.runs.run import Run

MODEL, CARD, SUMS = "model.pte", "README.md", "SHA256SUMS"
LICENCES = ("LICENSE*", "USE_POLICY*", "NOTICE*")  # of the checkpoint; whoever passes its weights on passes them on


def bundle(run: Run) -> Path:
    """Collect the exported file, its tokenizer, settings, card and checksums; return the stage's folder."""
    c = only(run.config, "tokenizer", "model", "export.chat", "export.max_seq_length", "export.max_context_length")
    exported, card = run.need("export", made_by="tune run export_executorch"), run.folder / CARD
    licences, metas = from_rank_zero(lambda: (licences_of(c), metas_tokenizer(c.tokenizer)))

    def build(folder: Path) -> dict[str, Any]:
        metrics = run.metrics("export")
        link_or_copy(exported / MODEL, folder / MODEL)
        tokenizer = tokenizer_of(c)
        tokenizer_files = write_tokenizer_files(c, tokenizer, folder)
        settings = generation_config(c, tokenizer, metrics["metadata"])
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        # in a run's folder the model lies in export/, here beside the card
        text = card.read_text(encoding="utf-8").replace("export/model.pte", MODEL)
        (folder / CARD).write_text(text, encoding="utf-8")
        (folder / "HOWTO.md").write_text(howto(tokenizer, tokenizer_files, settings, c.export.chat), encoding="utf-8")
        for path in (*licences, *metas):
            shutil.copyfile(path, folder / path.name)
        write_sums(folder, {MODEL: metrics["sha256"]})
        say(f"files for apps: {folder.with_name('bundle')}")
        return {"model": metrics["sha256"]}

    return run.stage("bundle", on_rank_zero(build), c, [exported, card, *licences, *metas], version=2)


def licences_of(c: Config) -> list[Path]:
    """Return the licence files that came with the checkpoint."""
    folder = Path(c.checkpoint_dir or "")
    if not c.checkpoint_dir or not folder.is_dir():
        return []
    return sorted(p for pattern in LICENCES for p in folder.glob(pattern) if p.is_file())


def metas_tokenizer(component: Component) -> list[Path]:
    """Return Meta's tokenizer.model, which Llama's Hugging Face folders hold too, if it has the ids of tokenizer.json.

    Its lines are the tokens, and 256 special ones follow.
    """
    path = Path(str(component.get("path")))
    if path.suffix != ".json":
        return []
    files = [path.parent / folder / "tokenizer.model" for folder in ("original", "")]
    found = [f for f in files if f.is_file()]
    if not found:
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = {*content["model"]["vocab"].values(), *(t["id"] for t in content.get("added_tokens", []))}
    return [f for f in found if f.read_bytes().count(b"\n") + 256 == len(ids)][:1]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which costs no space, or copy it where the file system has no hard links."""
    target.unlink(missing_ok=True)  # an interrupted attempt left it
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def write_tokenizer_files(c: Config, tokenizer: Any, folder: Path) -> list[str]:
    """Write the tokenizer in every form there is of it; return the files' names, best known first."""
    names = copy_tokenizer(c.tokenizer, folder)
    if is_tiktoken(tokenizer):
        write_tokenizer(tokenizer, shape_of(c.model).vocab, c.export.max_context_length, c.export.chat, folder)
        return list(dict.fromkeys([*names, "tokenizer.json", "tokenizer_config.json", "special_tokens.json"]))
    if (folder / "tokenizer.json").is_file():
        without_nfc(folder / "tokenizer.json")
    if tokenizer.template is not None:
        write_template(tokenizer.template.source, folder / "tokenizer_config.json")
    return names


def without_nfc(file: Path) -> None:
    """Take the NFC normalizer, which Qwen's tokenizers have, out of a tokenizer.json.

    Under it the C++ tokenizer of ExecuTorch 1.4.1 (pytorch_tokenizers 1.5.0) reads `é` as `e`. Keyboards write text in
    NFC already, and then no normalizer is needed for the ids to be right.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if (content.get("normalizer") or {}).get("type") == "NFC":
        content["normalizer"] = None
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_template(source: dict[str, str], config: Path) -> None:
    """Put the chat template that was trained into tokenizer_config.json, where apps look for it, if it is not there."""
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    named = [{"name": name, "template": code} for name, code in source.items()]
    template = source["default"] if list(source) == ["default"] else named
    if settings.get("chat_template") != template:
        settings["chat_template"] = template
        config.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_config(c: Config, tokenizer: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return how to generate: Hugging Face's names, and the lengths that the file was exported for."""
    bos = {"bos_token_id": metadata["get_bos_id"]} if "get_bos_id" in metadata else {}
    return bos | {
        "eos_token_id": metadata["get_eos_ids"],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        "max_length": c.export.max_context_length,
        "max_tokens_per_call": c.export.max_seq_length,
    }


def write_sums(folder: Path, known: dict[str, str]) -> None:
    """Write the SHA-256 of every file, as `sha256sum -c` reads them; `known` are those that need no reading."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (SUMS, "started.json"))
    lines = [f"{known.get(name) or sha256_file(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines))


HOWTO = """# Which app takes which file

| app | files |
| --- | --- |
| react-native-executorch (`useLLM`) | `model.pte`, `tokenizer.json`, `tokenizer_config.json` |
| ExecuTorch's LLM demo app for Android | `model.pte`, `{tokenizer}` |
| ExecuTorch's LLM demo app for iOS | `model.pte`, `{tokenizer}` |
| `llama_main`, ExecuTorch's runner | `model.pte`, `{tokenizer}` |
| a program of yours on ExecuTorch's `TextLLMRunner` | `model.pte`, `{tokenizer}` |

- The model holds {max_length:,} tokens, prompt and answer together.
- It reads up to {max_tokens_per_call:,} tokens per call. The runners split longer prompts themselves.
- An answer ends at one of the ids {stops}.
- `generation_config.json` has these numbers, and so has `model.pte`.

Check what you copied: `sha256sum -c SHA256SUMS`.

## react-native-executorch

```ts
const llm = useLLM({{
  model: {{
    modelSource: require('./assets/model.pte'),
    tokenizerSource: require('./assets/tokenizer.json'),
    tokenizerConfigSource: require('./assets/tokenizer_config.json'),
  }},
}});
```

The chat template is in `tokenizer_config.json`: {template}.

## Android demo app

```bash
adb shell mkdir -p /data/local/tmp/llama
adb push model.pte {tokenizer} /data/local/tmp/llama/
```

In the app's settings choose both files and the model type of the base model, whose template the app writes.

## iOS demo app

Drag `model.pte` and `{tokenizer}` into the app's folder in Finder, then choose them in the app.

## llama_main

```bash
adb push llama_main model.pte {tokenizer} /data/local/tmp/llama/
adb shell "cd /data/local/tmp/llama && ./llama_main --model_path model.pte --tokenizer_path {tokenizer} \\
    --temperature 0 --prompt '{prompt}'"
```

The prompt is written as the model was trained to read it, because `llama_main` knows no chat templates. The tokenizer
recognises special tokens in it. If there are both `tokenizer.model` and `tokenizer.json`, they give the same ids. Text
has to be in Unicode's form NFC, as keyboards write it.
"""


def howto(tokenizer: Any, tokenizer_files: list[str], settings: dict[str, Any], chat: bool) -> str:
    """Say which app takes which file."""
    stops = ", ".join(map(str, settings["eos_token_id"]))
    file = tokenizer_files[0] if tokenizer_files else "the tokenizer"
    # a chat template writes the opening token itself; in front of plain text the tokenizer puts it
    prompt = (
        tokenizer.render([{"role": "user", "content": "…"}], opened=True) if chat else opening_text(tokenizer) + "…"
    )
    prompt = prompt.replace("'", "'\\''")  # as a shell reads it in single quotes
    return HOWTO.format(tokenizer=file, stops=stops, prompt=prompt, template=tokenizer.template_name, **settings)


def opening_text(tokenizer: Any) -> str:
    """Return the token that the tokenizer puts in front of a text, written out."""
    return next((text for text, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id), "")
