"""Builds the default checkpoint's tokenizer: `python experiments/default_checkpoint/tokenizer.py [FOLDER]`.

512 ids: 256 bytes, 242 merges, Qwen's 14 control tokens. Capitals and digits are always tokens of their own, so that
reading a sign is spelling it; the words of questions and answers are one token each, with and without the space before
them. Merges are learned within words first; the space is joined to whole words last, so "red" and " red" cost one
merge more than " red" alone. The same text gives the same bytes: the weights depend on it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from infinitevl.config import tiny_processor
from infinitevl.files import written_aside
from infinitevl.processor import QWEN_TEMPLATE, preprocessor_json

VOCABULARY, INSIDE, SPACED = 512, 174, 68  # ids; merges inside words; merges of a space and a whole word
CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# A capital or digit alone; a lowercase word with the space before it; other spaces; line ends; signs.
PIECES = r"[A-Z0-9]| ?[a-z]+| +(?![a-z])|[\r\n]+|[^A-Za-z0-9\s]+"

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black", "grey", "pink", "brown", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
PLURALS = tuple(shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES)
QUESTIONS = (
    "what does the sign say?",
    "what digit is shown?",
    "how many {colour} {shapes}?",
    "what colour is the emblem?",
    "what shape is the emblem?",
    "is the door open?",
    "is the light on?",
    "what word came with the {colour} {shape}?",
    "what came with {word}?",
    "what word came before {word}?",
    "what word came after {word}?",
    "what word was shown at {time}?",
    "when was {word} shown?",
    "how many {colour} {shapes} were there?",
    "what was the first word?",
    "what was the last word?",
    "when did the light last change?",
    "when did the door last change?",
    "was {word} shown?",
    "was a {colour} {shape} shown?",
)
SPOKEN = ("no sign", "none", "not seen", "never", "yes", "no")
ANSWERS = (*SPOKEN, "{colour} {shape}", "{colour}", "{shape}", "{word}", "{time}")
CHAT = "system\nYou are a helpful assistant.\nuser\nassistant\n"
# So that other text is not spelled out letter by letter.
PROSE = (
    "The camera looks at the street and the people in it. A man with a dog is walking to the market in the morning. "
    "She put the book on the table near the window and went out of the room. There is a car behind the tree, and it "
    "is not moving. They have been here for an hour, but nothing has happened yet. What can you see in the picture? "
    "Please tell me how this works, and where it comes from. Two children are playing with a ball under the bridge."
)


def corpus(lines: int = 6000, seed: int = 0) -> list[str]:
    """`lines` questions with answers, fillers drawn by `seed`, and between them the chat's own words and some prose."""
    draw = random.Random(seed)
    text: list[str] = []
    for number in range(lines):
        filler = {
            "colour": draw.choice(COLOURS),
            "shape": draw.choice(SHAPES),
            "shapes": draw.choice(PLURALS),
            "word": "".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)),
            "time": f"{draw.randrange(10)}:{draw.randrange(60):02d}",
        }
        text += [draw.choice(QUESTIONS).format(**filler), draw.choice(ANSWERS).format(**filler)]
        if number % 20 == 0:
            text += [CHAT, " ".join(("the", *COLOURS, *SHAPES, *PLURALS))]
        if number % 100 == 0:
            text.append(PROSE)
    return text


def learn_inside(text: list[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte vocabulary plus the `merges` most frequent merges inside lowercase words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((word for line in text for word in re.findall("[a-z]+", line)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def spaced_words(text: list[str], vocabulary: dict[str, int]) -> list[str]:
    """The SPACED most frequent words after a space that are one token already, ties by alphabet."""
    count = Counter(word for line in text for word in re.findall(" ([a-z]+)", line) if word in vocabulary)
    return sorted(count, key=lambda word: (-count[word], word))[:SPACED]


def build() -> Tokenizer:
    """The tokenizer, checked: 512 ids, control tokens last, colours and shapes one token each."""
    text = corpus()
    vocabulary, merges = learn_inside(text, INSIDE)
    for word in spaced_words(text, vocabulary):
        vocabulary["Ġ" + word] = len(vocabulary)
        merges.append(("Ġ", word))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    check(tokenizer)
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """Raises ValueError where the promise of the module's first lines does not hold."""
    if tokenizer.get_vocab_size() != VOCABULARY or tokenizer.token_to_id(CONTROL[-1]) != VOCABULARY - 1:
        raise ValueError(f"{tokenizer.get_vocab_size()} ids instead of {VOCABULARY}: change INSIDE or SPACED")
    for word in (*COLOURS, *SHAPES, *PLURALS):
        for form in (word, " " + word):
            if len(tokenizer.encode(form).ids) != 1:
                raise ValueError(f"{form!r} is not one token: give it more weight in the corpus")


def write(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and preprocessor_config.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": QWEN_TEMPLATE,
    }
    files = {
        "tokenizer.json": build().to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "preprocessor_config.json": preprocessor_json(tiny_processor()),
    }
    for name, content in files.items():
        with written_aside(folder / name) as aside:
            aside.write_text(content, encoding="utf-8")


def main() -> None:
    home = Path(__file__).resolve().parents[2] / "src" / "infinitevl" / "checkpoints" / "tiny"
    parser = argparse.ArgumentParser(description="Build the default checkpoint's tokenizer.")
    parser.add_argument("folder", nargs="?", type=Path, default=home)
    folder = parser.parse_args().folder
    write(folder)
    print(f"{folder}: {(folder / 'tokenizer.json').stat().st_size} bytes of tokenizer.json, {VOCABULARY} ids")


if __name__ == "__main__":
    main()
