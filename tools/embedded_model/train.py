"""Train the embedded demonstration model and export it as a Hugging Face model folder.

The model is a 5.5 million parameter ``LlamaForCausalLM`` with its own 4096-token byte-level BPE.
It is trained from scratch on the corpus that ``corpus.py`` builds, on a CPU, for a given number
of minutes: the learning rate follows the wall clock, so any budget ends in a finished model::

    nice -n 19 python tools/embedded_model/train.py --minutes 105 --threads 2
    python tools/embedded_model/train.py --check replicas/models/tokenflow-books
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
EOT, SYSTEM, USER, ASSISTANT, END = range(5)
VOCAB_SIZE = 4096
CONTEXT = 1024

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] in ['system', 'developer'] -%}{%- set role = 'system' -%}
{%- elif message['role'] == 'assistant' -%}{%- set role = 'assistant' -%}
{%- else -%}{%- set role = 'user' -%}
{%- endif -%}
{{- '<|' + role + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# Scripture is seen less often than the novels: the model should read like a storyteller.
SOURCE_WEIGHT = {"web": 0.3}
CHAT_DOCUMENTS = 0.44  # share of documents, which comes to about 30 % of the tokens
MAX_PIECE = 260  # tokens; longer paragraphs are cut between sentences

ABOUT_NAME = [
    "Tell me about {x}.", "Who is {x}?", "What happened to {x}?", "Tell me a story about {x}.",
    "Write a scene with {x}.", "What did {x} do?", "What did {x} say?", "Describe {x}.",
    "Write a story about {x}.", "What do you think of {x}?", "Write a paragraph about {x}.",
    "Can you tell me about {x}?", "Please write a short scene in which {x} appears.",
    "I would like to hear about {x}.", "What do you know about {x}?",
]  # fmt: skip
ABOUT_TWO = [
    "Tell me about {x} and {y}.", "Write a conversation between {x} and {y}.",
    "What happened between {x} and {y}?", "Write a story about {x} and {y}.",
    "Write a scene with {x} and {y}.", "How did {x} meet {y}?",
]  # fmt: skip
ABOUT_NOUN = [
    "Write a paragraph about {x}.", "Tell me about the {x}.", "Describe the {x}.",
    "Write a story about a {x}.", "Tell me a story about the {x}.", "Explain {x} to me.",
    "What can you say about the {x}?", "Write something about {x}.", "What is a {x}?",
    "Write a short story about {x} and {y}.", "Tell me about {x} and {y}.", "{x}",
    "Write a passage that mentions the {x} and the {y}.", "Please describe a {x}.",
    "What are your thoughts on {x}?", "How would you describe the {x}?", "Why is {x} important?",
    "Could you write about {x} for me?", "Give me a paragraph about {x} and {y}.",
]  # fmt: skip
CONTINUE = [
    "Continue the story: {x}", "Continue: {x}", "Go on from here: {x}", "{x}",
    "What happens next? {x}", "Write what comes after this: {x}", "Finish this passage: {x}",
    "Here is the beginning: {x}", "Complete the text. {x}",
]  # fmt: skip
SHORT = [
    "In a sentence or two, tell me about {x}.", "Briefly, what about {x}?",
    "Write one sentence about {x}.", "Give me a short answer: what of {x}?",
    "Write a couple of sentences about {x}.", "Say something short about {x}.",
]  # fmt: skip
LONG = [
    "Write a long story about {x}.", "Tell me everything about {x}.",
    "Write several paragraphs about {x}.", "Tell me a long story about {x}.",
    "Write in detail about {x}.", "Write a chapter about {x}.",
]  # fmt: skip
GENERIC = [
    "Tell me a story.", "Write a paragraph.", "Write something.", "Tell me something interesting.",
    "Write a scene from a novel.", "Hello!", "Hi, how are you?", "What happened?", "Surprise me.",
    "Once upon a time", "Write a story.", "Can you help me?", "What do you think?", "Good morning.",
]  # fmt: skip
GO_ON = [
    "Go on.", "And then?", "What happened next?", "Continue.", "Tell me more.", "Please go on.",
    "More, please.", "Keep going.", "And what came of it?", "Thank you. What else?",
]  # fmt: skip
SYSTEMS = [
    "You are a storyteller.", "You are a helpful assistant.", "You write English prose.",
    "Answer in the style of an old novel.", "You are a novelist.", "Be brief and clear.",
    "You are a helpful assistant that tells stories.",
]  # fmt: skip

NAME = re.compile(
    r"(?<=[a-z,;] )((?:(?:Mr|Mrs|Miss|Dr|Sir|Lady|Captain|Colonel|Aunt)\.? )?[A-Z][a-z]{2,}"
    r"(?: [A-Z][a-z]{2,})?)"
)
# A word between a determiner and punctuation or a function word is nearly always a noun.
NOUN = re.compile(
    r"\b(?:the|a|an|his|her|my|our|their|this) ([a-z]{4,12})"
    r"(?=[,.;:!?]| of | was | is | had | and | in | that | to | which | with | from )"
)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)[\"']?\s+(?=[\"'A-Z])")


@dataclass
class Piece:
    """A paragraph, or a part of a long one."""

    text: str
    ids: list[int]
    starts_paragraph: bool


def read_corpus(path: Path) -> list[dict[str, Any]]:
    """The chapters of one split."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def build_tokenizer(chapters: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE. It starts from all 256 bytes, so any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ["\n\n".join(c["paragraphs"]) for c in chapters]
    prompts = ABOUT_NAME + ABOUT_NOUN + CONTINUE + SHORT + LONG + GENERIC + GO_ON + SYSTEMS
    tokenizer.train_from_iterator(texts + prompts * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[EOT],
        pad_token=SPECIAL[EOT],
        additional_special_tokens=SPECIAL[1:],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class Documents:
    """Turns chapters into packed training windows, newly sampled for each epoch."""

    def __init__(self, chapters: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._newline = self._encode("\n")
        self._chapters = [(c["source"], self._pieces(c["paragraphs"])) for c in chapters]
        self.size = len(self.epoch(0)[0])  # tokens of one epoch; epochs differ by a per cent

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _pieces(self, paragraphs: list[str]) -> list[Piece]:
        pieces: list[Piece] = []
        for paragraph in paragraphs:
            ids = self._encode(paragraph)
            if len(ids) <= MAX_PIECE:
                pieces.append(Piece(paragraph, ids, True))
                continue
            first = True
            group = ""
            for sentence in split_sentences(paragraph):
                if group and len(group) + len(sentence) > 3.6 * MAX_PIECE:
                    pieces.append(Piece(group, self._encode(("" if first else " ") + group), first))
                    first, group = False, ""
                group = f"{group} {sentence}" if group else sentence
            pieces.append(Piece(group, self._encode(("" if first else " ") + group), first))
        return pieces

    def _take(self, pieces: list[Piece], at: int, limit: int) -> tuple[list[int], int]:
        """Pieces from ``at`` on, at least one, while they fit; their tokens and the next index."""
        ids: list[int] = []
        begin = at
        while at < len(pieces) and (at == begin or len(ids) + len(pieces[at].ids) <= limit):
            piece = pieces[at]
            if at > begin and piece.starts_paragraph:
                ids += self._newline * 2
            elif at == begin and not piece.starts_paragraph:
                ids += self._encode(piece.text)  # without the leading space
                at += 1
                continue
            ids += piece.ids
            at += 1
        return ids, at

    def _chat(
        self, pieces: list[Piece], at: int, rng: random.Random
    ) -> tuple[list[int], list[bool], int]:
        """One conversation made of the passage at ``at``: tokens, loss mask, next index."""
        ids: list[int] = []
        mask: list[bool] = []

        def turn(role: int, content: list[int], learn: bool) -> None:
            head = [role, *self._newline]
            ids.extend([*head, *content, END, *self._newline])
            # Only what an assistant says, and that it ends, is worth learning.
            mask.extend([False] * len(head) + [learn] * (len(content) + 1) + [False])

        if rng.random() < 0.12:
            turn(SYSTEM, self._encode(rng.choice(SYSTEMS)), False)
        piece = pieces[at]
        sentences = split_sentences(piece.text)
        kind = rng.random()
        limit = rng.choice([80, 120, 180, 240, 300])
        if kind < 0.22 and len(sentences) > 1:
            opening = sentences[0]
            reply = self._encode(" ".join(sentences[1:]))
            more, after = self._take(pieces, at + 1, max(1, limit - len(reply)))
            if len(reply) < limit and more and len(reply) + len(more) < 500:
                follows = self._newline * 2 if pieces[at + 1].starts_paragraph else []
                reply, next_at = reply + follows + more, after
            else:
                next_at = at + 1
            prompt = rng.choice(CONTINUE).format(x=opening)
        elif kind < 0.38 and len(sentences) > 1:
            count = rng.choice([1, 1, 2, 3])
            reply = self._encode(" ".join(sentences[:count]))
            prompt = self._about(" ".join(sentences[:count]), rng, SHORT)
            next_at = at + 1
        else:
            long = kind > 0.88
            reply, next_at = self._take(pieces, at, 450 if long else limit)
            text = " ".join(p.text for p in pieces[at:next_at])
            prompt = self._about(text, rng, LONG if long else None)
        turn(USER, self._encode(prompt), False)
        turn(ASSISTANT, reply, True)
        while next_at < len(pieces) and rng.random() < 0.18:
            turn(USER, self._encode(rng.choice(GO_ON)), False)
            reply, next_at = self._take(pieces, next_at, rng.choice([80, 160, 240]))
            turn(ASSISTANT, reply, True)
        return [*ids, EOT], [*mask, True], next_at

    def _about(self, text: str, rng: random.Random, templates: list[str] | None) -> str:
        """A request whose subject is a name or a noun of the passage."""
        names = list(dict.fromkeys(NAME.findall(text)))
        nouns = list(dict.fromkeys(NOUN.findall(text)))
        if (not names and not nouns) or rng.random() < 0.06:
            prompt = rng.choice(GENERIC)
        elif templates:
            subject = rng.choice(names + ["the " + n for n in nouns])
            prompt = rng.choice(templates).format(x=subject)
        elif len(names) > 1 and rng.random() < 0.2:
            x, y = rng.sample(names, 2)
            prompt = rng.choice(ABOUT_TWO).format(x=x, y=y)
        elif names and (not nouns or rng.random() < 0.4):
            prompt = rng.choice(ABOUT_NAME).format(x=rng.choice(names))
        else:
            x = rng.choice(nouns)
            prompt = rng.choice(ABOUT_NOUN).format(x=x, y=rng.choice(nouns))
        # People type carelessly.
        if rng.random() < 0.1:
            prompt = prompt.lower()
        if rng.random() < 0.1:
            prompt = prompt.rstrip(".?!")
        return prompt

    def epoch(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """All documents once, shuffled and joined: token ids and labels (-100: not learnt)."""
        rng = random.Random(seed)
        documents: list[tuple[list[int], list[bool]]] = []
        for source, pieces in self._chapters:
            if rng.random() > SOURCE_WEIGHT.get(source, 1.0):
                continue
            at = 0
            while at < len(pieces):
                if rng.random() < CHAT_DOCUMENTS:
                    ids, mask, at = self._chat(pieces, at, rng)
                else:
                    ids, at = self._take(pieces, at, rng.randint(200, 1000))
                    ids = [*ids, EOT]
                    mask = [True] * len(ids)
                documents.append((ids, mask))
        rng.shuffle(documents)
        ids_all = np.concatenate([np.asarray(d[0], dtype=np.int64) for d in documents])
        mask_all = np.concatenate([np.asarray(d[1], dtype=bool) for d in documents])
        return ids_all, np.where(mask_all, ids_all, -100)


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, roughly; closing quotation marks stay with their sentence."""
    parts: list[str] = []
    last = 0
    for match in SENTENCE_END.finditer(text):
        # The match begins with a closing mark, if there is one.
        cut = match.end()
        parts.append(text[last:cut].strip())
        last = cut
    parts.append(text[last:].strip())
    return [p for p in parts if p]


def windows(
    stream: tuple[np.ndarray, np.ndarray], length: int, rng: random.Random | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stream into (inputs, next-token labels) rows; shuffled if ``rng`` is given."""
    ids, labels = stream
    offset = rng.randrange(length) if rng else 0
    count = (len(ids) - offset - 1) // length
    x = ids[offset : offset + count * length].reshape(count, length)
    y = labels[offset + 1 : offset + 1 + count * length].reshape(count, length)
    if rng:
        order = list(range(count))
        rng.shuffle(order)
        x, y = x[order], y[order]
    return x, y


def batches(
    documents: Documents, seed: int, length: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of batches."""
    x, y = windows(documents.epoch(seed), length, random.Random(seed + 1))
    for at in range(0, len(x) - rows + 1, rows):
        yield torch.from_numpy(x[at : at + rows]), torch.from_numpy(y[at : at + rows])


def model_config() -> LlamaConfig:
    """The architecture."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[EOT, END],
        pad_token_id=EOT,
        attn_implementation="sdpa",
    )


def drop_channels(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout with one mask for all positions of a row, which costs almost no random numbers."""
    return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[-1]), p)


class Learner:
    """The model, with fp32 master weights when it computes in bf16."""

    def __init__(self, precision: str, compiled: bool, dropout: float) -> None:
        self.model = LlamaForCausalLM(model_config())
        self.model.train()
        with torch.no_grad():  # residual outputs start small, as deep as the network is
            for name, p in self.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    p.mul_(1 / math.sqrt(2 * self.model.config.num_hidden_layers))
        if dropout:  # the corpus is small and is read many times
            for module_name, module in self.model.named_modules():
                if module_name.endswith(("embed_tokens", "o_proj", "down_proj")):
                    module.register_forward_hook(
                        lambda m, _, out: drop_channels(out, dropout) if m.training else out
                    )
        self.precision = precision
        self._own = list(self.model.parameters())
        if precision == "bf16":
            self.masters = [p.detach().clone() for p in self._own]
            # Rotary tables and norms compute in fp32 internally, so only weights lose bits.
            self.model.to(torch.bfloat16)
        else:
            self.masters = [p.data for p in self._own]
        decayed = [torch.nn.Parameter(m) for m in self.masters]
        self._leaves = decayed
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in decayed if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in decayed if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        self._forward = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=x, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).float()
        return F.cross_entropy(logits.view(-1, VOCAB_SIZE), y.reshape(-1), ignore_index=-100)

    def loss(self, x: torch.Tensor, y: torch.Tensor, training: bool) -> torch.Tensor:
        """Mean next-token loss of a batch."""
        context = (
            torch.autocast("cpu", dtype=torch.bfloat16)
            if self.precision == "autocast"
            else nullcontext()
        )
        with context:
            # Validation has other shapes; they are not worth a compilation.
            return self._forward(x, y) if training else self._loss(x, y)

    def step(self, x: torch.Tensor, y: torch.Tensor, lr: float) -> tuple[float, float]:
        """One update; the loss and the gradient norm before clipping."""
        loss = self.loss(x, y, training=True)
        loss.backward()
        for leaf, own in zip(self._leaves, self._own, strict=True):
            assert own.grad is not None
            leaf.grad = own.grad.float()
            own.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._leaves, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.publish()
        return loss.item(), norm.item()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the model that computes."""
        for leaf, own in zip(self._leaves, self._own, strict=True):
            if own.data_ptr() != leaf.data_ptr():
                own.copy_(leaf)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {
            "masters": [leaf.detach() for leaf in self._leaves],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state."""
        for leaf, saved in zip(self._leaves, state["masters"], strict=True):
            leaf.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()

    @torch.no_grad()
    def validate(self, stream: tuple[np.ndarray, np.ndarray]) -> float:
        """Mean loss over the held-out windows."""
        x, y = windows(stream, 512, None)
        total, count = 0.0, 0
        self.model.eval()
        for at in range(0, len(x), 16):
            labels = torch.from_numpy(y[at : at + 16])
            learnt = int((labels != -100).sum())
            inputs = torch.from_numpy(x[at : at + 16])
            total += self.loss(inputs, labels, training=False).item() * learnt
            count += learnt
        self.model.train()
        return total / count


def export(learner: Learner, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write the model folder; each file appears whole, so a reader never sees half of one."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        model = LlamaForCausalLM(model_config())
        for p, master in zip(model.parameters(), learner.state()["masters"], strict=True):
            p.data.copy_(master)
        model = model.to(torch.bfloat16)
        model.generation_config = GenerationConfig(
            eos_token_id=[EOT, END], pad_token_id=EOT, do_sample=True, temperature=0.8, top_p=0.95
        )
        model.save_pretrained(scratch)
        for key in ("is_local", "local_files_only"):  # how it was loaded, not what it is
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.chmod(0o644)
            os.replace(file, target / file.name)


def check(folder: Path) -> None:
    """Load an exported folder as a user would, and show what it writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    odd = "naïve café — “quotes” 日本語 🙂\tx\r\n\x00"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd, "the tokenizer must round-trip UTF-8"
    print(f"{model.num_parameters()} parameters, {model.dtype}, {len(tokenizer)} tokens")
    requests = [
        "Tell me a story about the sea.", "Who is Mr. Darcy?", "Describe a quiet evening at home.",
        "Write a long story about a letter.", "How does a computer work?",
    ]  # fmt: skip
    torch.manual_seed(0)
    for how, options in (
        ("greedy, repetition penalty 1.2", {"do_sample": False, "repetition_penalty": 1.2}),
        ("temperature 0.8, top-p 0.95", {"do_sample": True, "temperature": 0.8, "top_p": 0.95}),
    ):
        for request in requests:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": request}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            out = model.generate(**prompt, max_new_tokens=220, **options)
            new = out[0, prompt["input_ids"].shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True)
            print(f"\n--- {request} [{how}; {len(new)} tokens, last {new[-1].item()}]\n{text}")


def train(args: argparse.Namespace) -> None:
    """The training run."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    work: Path = args.work.expanduser()
    work.mkdir(parents=True, exist_ok=True)
    corpus: Path = args.corpus.expanduser()
    chapters = read_corpus(corpus / "train.jsonl")

    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    else:
        tokenizer = build_tokenizer(chapters)
        tokenizer.save_pretrained(work / "tokenizer")
    assert [tokenizer.convert_tokens_to_ids(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    documents = Documents(chapters, tokenizer.backend_tokenizer)
    held_out = Documents(read_corpus(corpus / "valid.jsonl"), tokenizer.backend_tokenizer).epoch(3)

    learner = Learner(args.precision, args.compile, args.dropout)
    step, tokens, epoch, elapsed, epochs_seen = 0, 0, 0, 0.0, 0.0
    next_export = args.first_export * 60.0
    if args.resume:
        saved = torch.load(work / "checkpoint.pt", weights_only=True)
        learner.load(saved["learner"])
        step, tokens, epoch = saved["step"], saved["tokens"], saved["epoch"] + 1
        elapsed, epochs_seen = saved["elapsed"], saved["epochs_seen"]
        next_export = saved["next_export"]

    budget = args.minutes * 60.0
    begun = time.monotonic() - elapsed
    last_save = last_log = time.monotonic()
    tokens_logged = tokens
    losses: list[float] = []
    log = (work / "log.jsonl").open("a", encoding="utf-8")

    def record(**values: Any) -> None:
        seconds = round(time.monotonic() - begun)
        row = {"step": step, "tokens": tokens, "elapsed_s": seconds, **values}
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(row, flush=True)

    def save() -> None:
        state = {
            "learner": learner.state(), "step": step, "tokens": tokens, "epoch": epoch,
            "elapsed": time.monotonic() - begun, "epochs_seen": epochs_seen,
            "next_export": next_export,
        }  # fmt: skip
        torch.save(state, work / "checkpoint.tmp")
        os.replace(work / "checkpoint.tmp", work / "checkpoint.pt")

    done = False
    while not done:
        # The last tenth trains at full length, so that late positions are not new to the model.
        late = time.monotonic() - begun > 0.9 * budget
        length = CONTEXT if late else CONTEXT // 2
        rows = max(1, args.batch_tokens // length)
        stream_tokens = 0
        for x, y in batches(documents, args.seed + 1000 * epoch, length, rows):
            now = time.monotonic()
            progress = (now - begun) / budget
            if progress >= 1 or (args.max_steps and step >= args.max_steps):
                done = True
                break
            if not late and progress > 0.9:
                break  # rebuild the epoch with longer windows
            warm = min(1.0, (step + 1) / args.warmup)
            lr = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            loss, norm = learner.step(x, y, lr)
            losses.append(loss)
            step += 1
            tokens += x.numel()
            stream_tokens += x.numel()
            epochs_seen += x.numel() / documents.size
            if step % args.log_every == 0:
                now = time.monotonic()
                rate = (tokens - tokens_logged) / (now - last_log)
                record(
                    loss=round(sum(losses) / len(losses), 4), lr=round(lr, 6), norm=round(norm, 2),
                    tokens_per_s=round(rate), epochs=round(epochs_seen, 2), length=length,
                )  # fmt: skip
                losses, last_log, tokens_logged = [], now, tokens
            if step % args.valid_every == 0:
                record(valid_loss=round(learner.validate(held_out), 4))
                last_log, tokens_logged = time.monotonic(), tokens
            if now - begun > next_export and args.export:
                export(learner, tokenizer, args.export)
                next_export = now - begun + args.export_every * 60.0
                record(exported=str(args.export))
            if now - last_save > args.save_every * 60.0:
                save()
                last_save = time.monotonic()
        epoch += 1

    save()
    record(valid_loss=round(learner.validate(held_out), 4), epochs=round(epochs_seen, 2), done=True)
    if args.export:
        export(learner, tokenizer, args.export)
        record(exported=str(args.export))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, default=Path("~/.cache/tokenflow-corpus"))
    parser.add_argument("--work", type=Path, default=Path("~/.cache/tokenflow-train"),
                        help="checkpoint, tokenizer and log")  # fmt: skip
    parser.add_argument("--export", type=Path, help="model folder to write")
    parser.add_argument("--check", type=Path, metavar="DIR", help="only try an exported folder")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--fresh", action="store_true", help="delete the work folder first")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget")
    parser.add_argument("--max-steps", type=int, default=0, help="stop early (for trials)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", choices=["fp32", "autocast", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--valid-every", type=int, default=200)
    parser.add_argument("--save-every", type=float, default=3.0, help="minutes")
    parser.add_argument("--first-export", type=float, default=10.0, help="minutes")
    parser.add_argument("--export-every", type=float, default=20.0, help="minutes")
    args = parser.parse_args()
    if args.check:
        check(args.check)
        return
    if args.fresh:
        shutil.rmtree(args.work.expanduser(), ignore_errors=True)
    train(args)


if __name__ == "__main__":
    main()
