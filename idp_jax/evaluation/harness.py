"""lm-evaluation-harness on our models: `HarnessLM` answers its three kinds of request.

Scores equal those of the harness's Hugging Face backend, but a context is read once: its
continuations are branches behind it in one row (see `layers.visibility`), and only the positions
that predict a continuation reach the vocabulary.

A pool chooses its prompt once per question, from what all of its options share: the common prefix
of their contexts' tokens. That is the context where they have one, and the text before the options
where these stand in it (WinoGrande). Where nothing is shared, or the context is empty, it is the
one prefix token (BOS or EOS) the harness puts there; a rolling likelihood has no context, so there
the whole window chooses, as in `perplexity`.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from idp_jax.evaluation.answers import effective, left_padded
from idp_jax.evaluation.journal import Journal
from idp_jax.evaluation.requests import Request, Score, common_prefix, score_requests
from idp_jax.evaluation.results import NOT_FINITE
from idp_jax.inference.generation import continued
from idp_jax.jobs.progress import SILENT, Progress
from idp_jax.models import Decoder
from idp_jax.processes import gather
from idp_jax.recover import Repaired
from idp_jax.sharding import filled_rows

MAX_NEW_TOKENS = 256  # the harness's default where a task says nothing


class HarnessLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Attributes:
        choices: by task and item, the pool's prompt for every question asked of it: one, or one for
            every window of a rolling likelihood (empty without a pool).
        refused: by task and item, why it could not be scored; see `skip`.
    """

    def __init__(
        self,
        repaired: Repaired | Decoder,
        tokenizer: Any,
        batch_size: int = 8,
        max_length: int | None = None,
        *,
        add_bos_token: bool | None = None,
        seed: int = 0,
        skip: bool = False,
        progress: Progress = SILENT,
        journal: Journal | None = None,
    ):
        """Takes the model and says how it is read.

        Args:
            tokenizer: a transformers tokenizer.
            batch_size: rows read at a time; it does not change scores.
            max_length: text tokens of a row at most; default is what the model's positions allow.
            add_bos_token: None leaves special tokens to the tokenizer.
            seed: of sampled answers.
            skip: an item that cannot be scored is noted in `refused` and its log-probabilities are
                not numbers, instead of an error that ends the evaluation.
            progress: of scoring and generation.
            journal: of batches that are known already.

        Raises:
            ValueError: a size below 1, or more tokens than learned positions.
        """
        super().__init__()
        self.repaired = Repaired.of(repaired)
        self.tokenizer = tokenizer
        self.max_length = _length_limit(self.repaired, max_length)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = filled_rows(batch_size)
        self.add_bos_token = add_bos_token
        self.seed = seed
        self.skip = skip
        self.progress = progress
        self.journal = journal or Journal()
        self.choices: dict[str, dict[int, list[int]]] = {}
        self.refused: dict[str, dict[int, str]] = {}
        self._vocabulary: list[str] | None = None

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text, where it has one."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context.

        Raises:
            ValueError: the tokenizer names no such token.
        """
        if (token := self._prefix_token()) is None:
            raise ValueError(
                "a text without a context needs a token before it, and the tokenizer names neither "
                "bos_token nor eos_token; add one to tokenizer_config.json"
            )
        return token

    def _prefix_token(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches prompts made with a chat template."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """The prompt that the tokenizer's chat template makes of messages."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Token ids; a BOS that the string already begins with is not added again."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            token = self._prefix_token()
            bos = None if token is None else self.tokenizer.decode(token)
            if has_bos_prefix(string, bos):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        # verbose=False: texts longer than the context are cut here, so there is nothing to warn of.
        return self.tokenizer.encode(string, verbose=False, **special)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding gives it."""
        asked = self._questions(requests)
        ready = [request for request in asked if request is not None]
        scores = iter(self._score(ready))
        found = [None if request is None else next(scores) for request in asked]
        keys = [(r.task_name, r.doc_id, bool(r.args[0])) for r in requests]
        self._record(keys, [None if score is None else score.choice for score in found])
        answers = [
            (math.nan, False) if score is None else (score.logprob, score.greedy) for score in found
        ]
        for request, answer in zip(requests, answers, strict=True):
            self._check_finite(request, answer[0])
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _questions(self, instances) -> list[Request | None]:
        """What is to be scored, all options of a question with one chooser; None where refused."""
        pairs = [self._encode_request(*instance.args) for instance in instances]
        questions: dict[tuple, list[int]] = {}
        for index, instance in enumerate(instances):
            # Options without a context, of a mutual information, are a question of their own.
            key = (instance.task_name, instance.doc_id, bool(instance.args[0]))
            key = (index,) if instance.doc_id is None else key
            questions.setdefault(key, []).append(index)
        found: list[Request | None] = [None] * len(instances)
        for members in questions.values():
            shared = common_prefix([pairs[i][0] for i in members])
            sizes = [len(pairs[i][1]) for i in members]
            if not 0 < min(sizes) <= max(sizes) <= self.max_length:
                size = max(sizes) if min(sizes) else 0
                reason = f"an answer of {size} tokens; only 1 to {self.max_length} can be scored"
                self._refuse(instances[members[0]], reason)
                continue
            # Contexts are cut from the left: no option's may be shorter than the chooser.
            chooser = (shared or [self.prefix_token_id])[-(self.max_length + 1 - max(sizes)) :]
            for index in members:
                found[index] = self._truncate(*pairs[index], chooser)
        return found

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        scores = self._score([self._truncate(context, text) for _, context, text in requests])
        return [(score.logprob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows that score every token once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in rolling:
                windows.append(Request(*make_disjoint_window(window), whole=True))
                owners.append(index)
        scores = self._score(windows)
        keys = [(requests[i].task_name, requests[i].doc_id, n) for n, i in enumerate(owners)]
        self._record(keys, [score.choice for score in scores])
        totals = [0.0] * len(requests)
        for index, score in zip(owners, scores, strict=True):
            totals[index] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self._check_finite(request, total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Text that continues each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        choices: list[int | None] = [None] * len(requests)
        for members in groups.values():
            found = self._continue([requests[i] for i in members])
            for index, (text, choice) in zip(members, found, strict=True):
                answers[index], choices[index] = text, choice
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        keys = [(request.task_name, request.doc_id, request.args[0]) for request in requests]
        self._record(keys, choices)
        return answers

    def _continue(self, requests: list) -> list[tuple[str, int | None]]:
        """Answers of requests with the same options, and the pool's choice for each."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], MAX_NEW_TOKENS))
        eos = None
        if self.eot_token_id is not None:
            eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until"), eos=eos)
        count = options.pop("max_gen_toks")
        options = effective(options)
        if count >= self.max_length:
            raise ValueError(
                f"{count} new tokens leave no room for a prompt in {self.max_length} tokens"
            )
        room = self.max_length - count
        prompts = [self.tok_encode(request.args[0])[-room:] for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        starts = range(0, len(order), self.batch_size)
        stop_ids = self._stop_ids(until)
        answers: list[tuple[str, int | None]] = [("", None)] * len(prompts)
        for start in self._progress("generating")(starts):
            members = order[start : start + self.batch_size]
            ids, mask = left_padded(
                [prompts[i] for i in members], self.batch_size, self.eot_token_id
            )
            parts = (count, stop_ids, options, start)
            compute = partial(self._generate, ids, mask, *parts)
            tokens, choices = self.journal(compute, "generation", ids, mask, parts, self.seed)
            for number, index in enumerate(members):
                if tokens[number] is None:
                    self._refuse(requests[index], f"logits behind it are not finite: {NOT_FINITE}")
                    continue
                text = self._text(np.asarray(tokens[number]), stop_ids, until)
                answers[index] = text, None if choices is None else int(choices[number])
        return answers

    def _generate(self, ids, mask, count: int, stop_ids: list[int], options: dict, start: int):
        """New tokens of a batch and the pool's choices, as lists; `start` draws its samples.

        A row whose logits are not finite has None for its tokens.
        """
        choices = gather(_choose(self.repaired, ids, mask))
        tokens, finite = continued(
            self.repaired,
            ids,
            mask,
            count,
            stop_ids,
            temperature=options["temperature"] if options["do_sample"] else 0.0,
            top_k=options.get("top_k"),
            key=jax.random.fold_in(jax.random.key(self.seed), start),
        )
        rows = zip(np.asarray(gather(tokens)).tolist(), np.asarray(gather(finite)), strict=True)
        listed = [row if well else None for row, well in rows]
        return listed, None if choices is None else np.asarray(choices).tolist()

    def _text(self, tokens: np.ndarray, stop_ids: list[int], until: list[str]) -> str:
        ends = np.flatnonzero(np.isin(tokens, stop_ids))
        tokens = tokens[: ends[0] + 1] if len(ends) else tokens
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return postprocess_generated_text(text, until, None)

    def _stop_ids(self, until: list[str]) -> list[int]:
        """Tokens after which nothing can change the answer: ends of text, and any stop string.

        A stop string that spans tokens is cut off afterwards; decoding runs on meanwhile.
        """
        config = self.repaired.decoder.config
        ends = {self.eot_token_id, *config.eos_token_ids} & set(range(config.vocab_size))
        if self._vocabulary is None:
            size = min(len(self.tokenizer), config.vocab_size)
            self._vocabulary = self.tokenizer.batch_decode([[token] for token in range(size)])
        special = set(self.tokenizer.all_special_ids)
        strings = [string for string in until if string]
        for token, text in enumerate(self._vocabulary or []):
            if token not in special and any(string in text for string in strings):
                ends.add(token)
        return sorted(ends)

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens and tokens[0] == self._prefix_token():
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _truncate(
        self, context: Sequence[int], continuation: Sequence[int], chooser: list[int] | None = None
    ) -> Request:
        """Cuts the context from the left; a text's last token, only predicted, takes no room."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens behind {len(context)} cannot be "
                f"scored; both need text, and at most {self.max_length} tokens"
            )
        room = self.max_length + 1 - len(continuation)
        return Request(list(context[-room:]), list(continuation), chooser=chooser)

    def _score(self, requests: list[Request]) -> list[Score]:
        return score_requests(
            self.repaired,
            requests,
            self.batch_size,
            self.max_length,
            self._progress("scoring"),
            self.journal,
        )

    def _refuse(self, instance, reason: str) -> None:
        """Notes an item that cannot be scored, or ends the evaluation with it."""
        if not self.skip:
            where = f"item {instance.doc_id} of {instance.task_name}"
            raise ValueError(f"{where} cannot be scored: {reason}")
        self.refused.setdefault(instance.task_name, {}).setdefault(instance.doc_id, reason)

    def _check_finite(self, instance, logprob: float) -> None:
        refused = instance.doc_id in self.refused.get(instance.task_name, ())
        if not refused and not math.isfinite(logprob):
            self._refuse(instance, f"its log-probability is {logprob}: {NOT_FINITE}")

    def _progress(self, description: str) -> Callable:
        return self.progress.tracker(description)

    def _record(self, keys: list, choices: list[int | None]) -> None:
        """Keeps one choice per question (task, item, and what of it): all its answers share it."""
        chosen = {
            key: choice for key, choice in zip(keys, choices, strict=True) if choice is not None
        }
        for (task, item, _), choice in chosen.items():
            self.choices.setdefault(task, {}).setdefault(item, []).append(choice)


def _length_limit(repaired: Repaired, max_length: int | None) -> int:
    config = repaired.decoder.config
    prompt = 0 if repaired.prefix is None else int(repaired.prefix.next_position.max())
    # Learned positions end somewhere, so a prompt takes room from the text; rotary ones do not.
    limit = config.max_positions - (prompt if config.rope is None else 0)
    max_length = limit if max_length is None else max_length
    if limit < 1:
        raise ValueError(
            f"a prompt of {prompt} tokens leaves no room for text in the {config.max_positions} "
            "learned positions; train a shorter one"
        )
    if max_length < 1 or (config.rope is None and max_length > limit):
        raise ValueError(f"max_length {max_length} must lie between 1 and {limit}")
    return max_length


@jax.jit
def _choose(repaired: Repaired, ids: jax.Array, mask: jax.Array):
    return repaired.choose(ids, mask)
