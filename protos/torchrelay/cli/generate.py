"""`torchrelay generate` and `torchrelay chat`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from torchrelay.cli import beams, output, sources
from torchrelay.cli import connection as at
from torchrelay.cli import token_choice as choice
from torchrelay.client import Client, GenerationOptions, GenerationStream, Prompt, RelayError, make_chat
from torchrelay.client.requests import Priority
from torchrelay.v1 import generation_pb2 as pb

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Model name; the only one if there is just one.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=0, help="Most tokens of the answer.")]
TemperatureOption = Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Sample among the k most probable.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="String that ends the answer; repeatable.")]
SystemOption = Annotated[str, typer.Option("--system", help="System message.")]


def make_options(**values: object) -> GenerationOptions:
    """Keep the options that were given."""
    given = {key: value for key, value in values.items() if value is not None and value != []}
    return cast(GenerationOptions, given)


def make_structured_output(json_schema: str, regex: str, choices: list[str]) -> pb.StructuredOutput | None:
    """Return what the answer must match, None for anything. A schema begins as JSON does; else it is a file's name.

    Raises BadParameter for more than one of them, and for a file that cannot be read.
    """
    given = [
        name for name, value in (("--json-schema", json_schema), ("--regex", regex), ("--choice", choices)) if value
    ]
    if len(given) > 1:
        raise typer.BadParameter(f"not together with {given[0]}", param_hint=given[1])
    if choices:
        return pb.StructuredOutput(choices=pb.Choices(values=choices))
    if regex:
        return pb.StructuredOutput(regex=regex)
    if not json_schema:
        return None
    if not json_schema.lstrip().startswith("{"):
        try:
            json_schema = Path(json_schema).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"cannot be read: {error}", param_hint="--json-schema") from error
    return pb.StructuredOutput(json_schema=json_schema)


def read_tools(tools: str) -> list[dict[str, Any]]:
    """Return tools as `make_chat` takes them, also from OpenAI's form. Raises typer.BadParameter."""
    try:
        text = tools if tools.lstrip().startswith("[") else Path(tools).read_text(encoding="utf-8")
        return [{"name": "", **tool.get("function", tool)} for tool in json.loads(text)]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise typer.BadParameter(
            "is neither a JSON array of tools nor a file with one", param_hint="--tools"
        ) from error


def choose_model(client: Client, name: str) -> str:
    """Return the model to use; without a name, the only one that is served."""
    if name:
        return name
    names = [model.name for model in client.models()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise typer.BadParameter("no model is registered yet; start a worker, or register one")
    raise typer.BadParameter(f"several models are served: {', '.join(names)}", param_hint="--model")


class Answer:
    """Collects a stream, and prints its first output as it comes."""

    def __init__(self, *, echo: bool) -> None:
        self._echo = echo
        self.generation_id = ""
        self.config = pb.GenerationConfig()
        self.text: dict[int, str] = {}
        self.reasoning: dict[int, str] = {}
        self.tool_calls: dict[int, list[dict[str, str]]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.details: dict[int, list[dict[str, Any]]] = {}  # of each token, where alternatives were asked for
        self.prompt_scores: dict[int, dict[str, Any]] = {}  # by index in the prompt: parts may come twice
        self.finished = pb.Finished()

    def read(self, stream: GenerationStream) -> None:
        for event in stream:
            kind = event.WhichOneof("event")
            if kind == "accepted":
                self.generation_id, self.config = event.accepted.generation_id, event.accepted.config
            elif kind == "deltas":
                for delta in event.deltas.deltas:
                    self._take(delta)
            elif kind == "prompt_scores":
                scores = event.prompt_scores
                self.prompt_scores |= dict(enumerate(_scored(scores), scores.first_token_index))
            elif kind == "finished":
                self.finished = event.finished
        if self._echo:
            for call in self.tool_calls.get(0, ()):
                output.write(f"{call['name']}({call['arguments']})\n")
            output.write("\n")

    def _take(self, delta: pb.Delta) -> None:
        index = delta.output_index
        self.text[index] = self.text.get(index, "") + delta.text
        self.reasoning[index] = self.reasoning.get(index, "") + delta.reasoning_text
        calls = self.tool_calls.setdefault(index, [])
        for piece in delta.tool_calls:
            if piece.name:
                calls.append({"id": piece.id, "name": piece.name, "arguments": ""})
            calls[piece.index]["arguments"] += piece.arguments
        self.token_ids.setdefault(index, []).extend(delta.token_ids)
        self.logprobs.setdefault(index, []).extend(delta.logprobs)
        for rank, alternatives in zip(delta.ranks, delta.top_logprobs, strict=True):
            self.details.setdefault(index, []).append({"rank": rank, "alternatives": _pairs(alternatives)})
        if self._echo and index == 0:
            if delta.reasoning_text:
                output.stderr.print(delta.reasoning_text, style="dim", end="", markup=False, highlight=False)
            output.write(delta.text)

    def outputs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for end in self.finished.outputs:
            index = end.output_index
            item: dict[str, Any] = {
                "text": self.text.get(index, ""),
                "token_ids": self.token_ids.get(index, []),
                "finish_reason": pb.FinishReason.Name(end.finish_reason).removeprefix("FINISH_REASON_").lower(),
            }
            if self.reasoning.get(index):
                item["reasoning"] = self.reasoning[index]
            if self.tool_calls.get(index):
                item["tool_calls"] = self.tool_calls[index]
            if end.WhichOneof("stop_match"):
                item["stop_match"] = end.stop if end.WhichOneof("stop_match") == "stop" else end.stop_token_id
            if self.logprobs.get(index):
                item["logprobs"] = self.logprobs[index]
            if self.details.get(index):
                item["top_logprobs"] = self.details[index]
            if end.HasField("score"):
                item["score"] = end.score
            found.append(item)
        return found

    def as_json(self) -> dict[str, Any]:
        outputs = self.outputs()
        usage = self.finished.usage
        value: dict[str, Any] = dict(outputs[0]) if outputs else {}
        if len(outputs) > 1:
            value["outputs"] = outputs
        if self.prompt_scores:
            value["prompt_scores"] = [self.prompt_scores[index] for index in sorted(self.prompt_scores)]
        return value | {
            "generation_id": self.generation_id,
            "seed": self.config.seed,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_prompt_tokens": usage.cached_prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            },
            "timings": self._timings(),
        }

    def summary(self) -> str:
        timings = self._timings()
        tokens = self.finished.usage.completion_tokens
        decode_ms = timings["total_ms"] - timings["time_to_first_token_ms"]
        rate = f"{(tokens - 1) / decode_ms * 1000:.1f} tok/s | " if tokens > 1 and decode_ms > 0 else ""
        reason = ", ".join(item["finish_reason"] for item in self.outputs())
        takeovers = f"{timings['num_takeovers']} takeovers | " if timings["num_takeovers"] else ""
        return (
            f"{tokens} tokens | queue {timings['queue_ms']:.0f} ms | "
            f"first token {timings['time_to_first_token_ms']:.0f} ms | {rate}{takeovers}"
            f"finish: {reason} | {self.generation_id}"
        )

    def _timings(self) -> dict[str, Any]:
        timings = self.finished.timings
        return {
            "queue_ms": timings.queue_time.ToMicroseconds() / 1000,
            "time_to_first_token_ms": timings.time_to_first_token.ToMicroseconds() / 1000,
            "total_ms": timings.total_time.ToMicroseconds() / 1000,
            "num_takeovers": timings.num_takeovers,
        }


def _pairs(alternatives: pb.TokenAlternatives) -> list[list[float]]:
    return [
        [token_id, logprob] for token_id, logprob in zip(alternatives.token_ids, alternatives.logprobs, strict=True)
    ]


def _scored(scores: pb.PromptScores) -> list[dict[str, Any]]:
    """One entry per token."""
    found: list[dict[str, Any]] = [
        {"logprob": logprob, "rank": rank} for logprob, rank in zip(scores.logprobs, scores.ranks, strict=True)
    ]
    for item, alternatives in zip(found, scores.top_logprobs, strict=False):
        item["alternatives"] = _pairs(alternatives)
    return found


def run_stream(client: Client, stream: GenerationStream, *, echo: bool) -> Answer:
    """Read a stream to its end; Ctrl-C cancels the generation."""
    answer = Answer(echo=echo)
    try:
        answer.read(stream)
    except KeyboardInterrupt:
        if stream.generation_id:
            client.cancel(stream.generation_id)
            output.stderr.print(f"\ncancelled {stream.generation_id}")
        raise
    return answer


@at.connected
def generate(
    text: Annotated[str, typer.Argument(help="What to ask or continue; - reads stdin.")],
    model: ModelOption = "",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Least relative probability.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option("--repetition-penalty", help="1 is off.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option("--no-repeat-ngram-size", help="0 is off.")] = None,
    seed: SeedOption = None,
    num_outputs: Annotated[int | None, typer.Option("--num-outputs", "-n", min=1, help="Number of answers.")] = None,
    stop: StopOption = None,
    logprobs: Annotated[bool | None, typer.Option("--logprobs", help="Report log-probabilities (--json).")] = None,
    json_schema: Annotated[str, typer.Option("--json-schema", help="The answer's schema: JSON, or a file.")] = "",
    regex: Annotated[str, typer.Option("--regex", help="Expression that the whole answer matches.")] = "",
    possible: Annotated[list[str] | None, typer.Option("--choice", help="A possible answer; repeatable.")] = None,
    min_tokens: choice.MinTokensOption = None,
    min_length: choice.MinLengthOption = None,
    max_length: choice.MaxLengthOption = None,
    ignore_eos: choice.IgnoreEosOption = None,
    stop_token_id: choice.StopTokenIdOption = None,
    typical_p: choice.TypicalPOption = None,
    epsilon_cutoff: choice.EpsilonCutoffOption = None,
    eta_cutoff: choice.EtaCutoffOption = None,
    top_h: choice.TopHOption = None,
    presence_penalty: choice.PresencePenaltyOption = None,
    frequency_penalty: choice.FrequencyPenaltyOption = None,
    bad_word: choice.BadWordOption = None,
    bad_words_ids: choice.BadWordsIdsOption = None,
    logit_bias: choice.LogitBiasOption = None,
    sequence_bias: choice.SequenceBiasOption = None,
    suppress_token: choice.SuppressTokenOption = None,
    begin_suppress_token: choice.BeginSuppressTokenOption = None,
    exponential_decay: choice.ExponentialDecayOption = None,
    forced_eos_token_id: choice.ForcedEosOption = None,
    forced_bos_token_id: choice.ForcedBosOption = None,
    encoder_repetition_penalty: choice.EncoderRepetitionPenaltyOption = None,
    encoder_no_repeat_ngram_size: choice.EncoderNGramOption = None,
    top_logprobs: Annotated[
        int | None, typer.Option("--top-logprobs", min=0, help="Report so many alternatives of each token (--json).")
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option("--prompt-logprobs", min=0, help="Score the prompt, with so many alternatives (--json)."),
    ] = None,
    best_of: Annotated[int | None, typer.Option("--best-of", min=1, help="Sample so many, return the best.")] = None,
    include_stop: Annotated[bool | None, typer.Option("--include-stop", help="Keep the stop string.")] = None,
    echo: Annotated[bool | None, typer.Option("--echo", help="Begin with the prompt (--raw).")] = None,
    num_beams: beams.NumBeamsOption = None,
    length_penalty: beams.LengthPenaltyOption = None,
    early_stopping: beams.EarlyStoppingOption = None,
    renormalize_logits: beams.RenormalizeOption = None,
    translate_to: sources.TranslateToOption = None,
    translate_from: sources.TranslateFromOption = None,
    summarize: sources.SummarizeOption = False,
    truncate: sources.TruncateOption = None,
    tools: Annotated[str, typer.Option("--tools", help="What may be called: a JSON array, or a file with one.")] = "",
    tool_choice: Annotated[
        str | None, typer.Option("--tool-choice", help="auto, none, required, or a tool's name.")
    ] = None,
    system: SystemOption = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    adapter: Annotated[str, typer.Option("--adapter", help="One of the model's adapters.")] = "",
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="Seconds.")] = None,
    priority: Annotated[str | None, typer.Option("--priority", help="high, normal or low; as the key allows.")] = None,
    as_json: at.JsonOption = False,
    *,
    connection: at.Connection,
) -> None:
    """Generate text and stream it to stdout."""
    text = sys.stdin.read() if text == "-" else text
    options = make_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        seed=seed,
        num_outputs=num_outputs,
        stop=stop,
        logprobs=logprobs,
        structured_output=make_structured_output(json_schema, regex, possible or []),
        min_tokens=min_tokens,
        min_length=min_length,
        max_length=max_length,
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_id,
        typical_p=typical_p,
        epsilon_cutoff=epsilon_cutoff,
        eta_cutoff=eta_cutoff,
        top_h=top_h,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        bad_words=bad_word,
        bad_words_ids=choice.phrases_of(bad_words_ids),
        logit_bias=choice.biases_of(logit_bias),
        sequence_bias=choice.phrase_biases_of(sequence_bias),
        suppress_tokens=suppress_token,
        begin_suppress_tokens=begin_suppress_token,
        exponential_decay_length_penalty=choice.decay_of(exponential_decay),
        forced_eos_token_id=forced_eos_token_id,
        forced_bos_token_id=forced_bos_token_id,
        encoder_repetition_penalty=encoder_repetition_penalty,
        encoder_no_repeat_ngram_size=encoder_no_repeat_ngram_size,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        best_of=best_of,
        include_stop=include_stop,
        echo=echo,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=beams.early_stopping_of(early_stopping),
        renormalize_logits=renormalize_logits,
    )
    asked = sources.input_of(text, translate_to, translate_from, truncate, summarize=summarize)
    with output.explained_errors(connection.address), connection.client() as client:
        name = choose_model(client, model)
        card = next((card for card in client.models() if card.name == name), None)
        as_chat = asked is None and not raw and card is not None and card.has_chat_template
        prompt: Prompt = text if asked is None else asked
        if as_chat:
            prompt = [{"role": "system", "content": system}] if system else []
            prompt = [*prompt, {"role": "user", "content": text}]
            if tools:
                prompt = make_chat(prompt, tools=read_tools(tools), tool_choice=tool_choice)
        elif tools:
            raise typer.BadParameter("needs a model with a chat template, and no --raw", param_hint="--tools")
        elif system:
            raise typer.BadParameter("needs a model with a chat template, and no --raw", param_hint="--system")
        try:
            stream = client.stream(
                prompt,
                model=name,
                adapter=adapter,
                time_limit_s=time_limit,
                priority=cast(Priority | None, priority),
                **options,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--priority") from error
        answer = run_stream(client, stream, echo=not as_json)
        if as_json:
            output.print_json(answer.as_json())
        else:
            for item in answer.outputs()[1:]:
                output.write(f"---\n{item['text']}\n")
            output.stderr.print(answer.summary(), style="dim", soft_wrap=True)


@at.connected
def chat(
    model: ModelOption = "",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    system: SystemOption = "",
    *,
    connection: at.Connection,
) -> None:
    """Hold a conversation. Ctrl-C cancels an answer, Ctrl-D leaves."""
    options = make_options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    messages = [{"role": "system", "content": system}] if system else []
    with output.explained_errors(connection.address), connection.client() as client:
        name = choose_model(client, model)
        output.stderr.print(f"{name}: Ctrl-C cancels an answer, Ctrl-D leaves", style="dim")
        while True:
            try:
                output.stderr.print("> ", end="", style="bold")
                text = input()
            except EOFError:
                output.stderr.print()
                return
            except KeyboardInterrupt:
                output.stderr.print()
                continue
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            try:
                answer = run_stream(client, client.stream(messages, model=name, **options), echo=True)
            except KeyboardInterrupt:
                messages.pop()
                continue
            except RelayError as error:
                messages.pop()
                output.print_error(error, connection.address)
                continue
            messages.append({"role": "assistant", "content": answer.text.get(0, "")})
            output.stderr.print(answer.summary(), style="dim", soft_wrap=True)
