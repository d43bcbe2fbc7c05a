"""Bodies of requests as pydantic models: names, types and ranges. `requests` checks what fields mean together."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema

from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.infer.serve.limits import check_size, listed, number, sized

_TEXT = {"type": "string"}


def record(required: str, **properties: Any) -> dict[str, Any]:
    """An object in the OpenAPI document; ``required`` names its required fields."""
    return {"type": "object", "required": required.split(), "properties": properties}


_PART = record("type text", type={"enum": ["text"]}, text=_TEXT)
_FUNCTION = record("name", name={"type": "string", "minLength": 1}, arguments=_TEXT)
_CALL = record("function", id=_TEXT, type={"enum": ["function"]}, function=_FUNCTION)
Stop = Annotated[
    Any, WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}, {"type": "null"}]})
]
ChatMessage = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
                "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]},
                "reasoning_content": {"anyOf": [_TEXT, {"type": "null"}]},
                "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
                "tool_call_id": _TEXT,
                "name": _TEXT,
            },
        }
    ),
]


class Body(BaseModel):
    """The base of all bodies. Numbers must be numbers, not strings. Unknown fields are kept in ``model_extra``."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = Field(
        False, description="with include_usage: every chunk has the usage so far"
    )

    @property
    def continuous(self) -> bool:
        """Whether every chunk carries the usage."""
        return bool(self.include_usage and self.continuous_usage_stats)


class JsonSchemaFormat(Body):
    name: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="true refuses keywords that cannot be enforced")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="as llama.cpp has it, beside the type")
    pattern: str | None = None
    grammar: str | None = None


Schema = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, _TEXT, {"type": "null"}]})]


class StructuredOutputs(Body):
    """vLLM's field; one kind may be given."""

    json_: Schema = Field(None, alias="json", description="a JSON schema, or its text")
    regex: str | None = None
    choice: list[str] | None = listed("choices")
    grammar: str | None = Field(None, description="in Lark or GBNF")
    json_object: bool | None = None

    def of(self, kind: str) -> Any:
        return self.json_ if kind == "json" else getattr(self, kind)


class Nvext(Body):
    """NIM's field; one kind of guide may be given. The other fields stand for those of the same names beside it."""

    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = listed("choices")
    guided_grammar: str | None = None
    ignore_eos: bool | None = None
    top_k: int | None = number("top_k")
    min_p: float | None = number("min_p")
    repetition_penalty: float | None = number("repetition_penalty")
    max_thinking_tokens: int | None = number("thinking_token_budget")

    def of(self, kind: str) -> Any:
        return getattr(self, f"guided_{kind}", None)


class SampledRequest(Body):
    """The fields that chats and completions share: OpenAI's, and those that vLLM adds."""

    model: str | None = sized("model", doc="one of GET /v1/models (default: the first)")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = number("max_tokens", doc="cut to the room in the context (default: that room)")
    temperature: float | None = number("temperature", doc="0 is greedy")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    min_p: float | None = number("min_p")
    repetition_penalty: float | None = number("repetition_penalty")
    presence_penalty: float | None = number("presence_penalty")
    frequency_penalty: float | None = number("frequency_penalty")
    seed: int | None = number("seed", doc="taken modulo 2^32")
    n: int | None = number("n")
    stop: Stop = None
    stop_token_ids: list[int] | None = listed("stop_token_ids")
    ignore_eos: bool | None = False
    min_tokens: int | None = number("min_tokens")
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(partial(check_size, "logit_bias"))] = sized(
        "logit_bias", doc="token ids to what is added to their logits"
    )
    allowed_token_ids: list[int] | None = listed("allowed_token_ids")
    prompt_logprobs: int | None = number("prompt_logprobs")
    include_stop_str_in_output: bool | None = False
    no_stop_trim: bool | None = Field(False, description="SGLang's name of include_stop_str_in_output")
    skip_special_tokens: bool | None = True
    truncate_prompt_tokens: int | None = number(
        "truncate_prompt_tokens", doc="use only so many of the last prompt tokens"
    )
    return_token_ids: bool | None = False
    priority: int | None = number("priority", doc="lower runs first; ignored unless --scheduling-policy is priority")
    cache_salt: str | None = sized("cache_salt", doc="prompts share cached pages only under the same salt")
    user: str | None = Field(None, description="ignored")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = Field(None, description="as structured_outputs.json")
    guided_regex: str | None = None
    guided_choice: list[str] | None = listed("choices")
    guided_grammar: str | None = Field(None, description="as structured_outputs.grammar: Lark or GBNF")
    regex: str | None = Field(None, description="SGLang's name of guided_regex")
    ebnf: str | None = Field(None, description="SGLang's name of guided_grammar")
    grammar: str | None = Field(None, description="llama.cpp's name of guided_grammar")
    json_schema: Schema = Field(None, description="SGLang's and llama.cpp's name of guided_json")
    nvext: Nvext | None = None

    def sampled(self, name: str) -> Any:
        """A field that `nvext` may give too; the one beside it takes precedence."""
        value = getattr(self, name)
        return getattr(self.nvext, name) if value is None and self.nvext is not None else value


class ThinkingSwitch(Body):
    """Anthropic's switch, which other chat interfaces have too."""

    type: Literal["enabled", "adaptive", "auto", "disabled"]
    budget_tokens: int | None = number("budget_tokens")


class ReasoningOptions(Body):
    """OpenRouter's switch, with the effort of OpenAI's /v1/responses."""

    effort: str | None = Field(None, description="as reasoning_effort")
    max_tokens: int | None = number("thinking_token_budget")
    exclude: bool | None = Field(None, description="true leaves the thinking out of the answer")
    enabled: bool | None = None


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions, and what the other conversation endpoints convert their bodies to."""

    messages: list[ChatMessage] = listed("messages", ...)
    max_completion_tokens: int | None = number("max_completion_tokens", doc="takes precedence over max_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = number("top_logprobs")
    tools: list[dict[str, Any]] | None = listed("tools")
    tool_choice: Any = None
    functions: list[Any] | None = listed("tools", doc="OpenAI's first form of tools")
    function_call: Any = Field(None, description="OpenAI's first form of tool_choice")
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = Field(
        None, description="none switches thinking off, minimal, low and medium bound it, high, xhigh and max do not"
    )
    include_reasoning: bool | None = True
    thinking_token_budget: int | None = number("thinking_token_budget", doc="takes precedence over reasoning_effort")
    chat_template_kwargs: dict[str, Any] | None = sized(
        "chat_template_kwargs", doc="enable_thinking: true or false, and the names that the template reads"
    )
    enable_thinking: bool | None = Field(None, description="false switches thinking off")
    thinking: ThinkingSwitch | None = None
    reasoning: ReasoningOptions | None = None
    continue_final_message: bool | None = Field(
        None, description="whether the answer continues the last message; null: if it is an assistant's text"
    )
    add_generation_prompt: bool | None = Field(None, description="true begins a new answer in any case")
    _client: ClientForm = PrivateAttr(default_factory=ClientForm)

    @property
    def client(self) -> ClientForm:
        """How the request was said in its client's interface."""
        return self._client

    def from_client(self, client: ClientForm) -> ChatRequest:
        """This request, read from what ``client`` describes."""
        self._client = client
        return self
