"""Every field of every interface, and what the server does with it.

A field that would change the answer is done or refused, never ignored. What other servers add (vLLM, SGLang,
llama.cpp, NIM, TGI, OpenRouter) is in the tables too, since their clients send it. Fields that no table has are
ignored, and named in a header as the ignored ones are.
"""

from __future__ import annotations

from collections.abc import Mapping

from stepjax.infer.serve.fields.field_table import FieldRule, FieldTable


def _merged(*tables: Mapping[str, str]) -> dict[str, str]:
    """Paths by reason, of several tables."""
    merged: dict[str, str] = {}
    for table in tables:
        for reason, paths in table.items():
            merged[reason] = f"{merged.get(reason, '')} {paths}"
    return merged


_FORMAT = "response_format response_format.type response_format.pattern response_format.schema response_format.grammar"
_FORMAT += "".join(f" response_format.json_schema{part}" for part in ("", ".name", ".schema", ".strict"))
_STRUCTURED = " ".join(
    ["structured_outputs", *(f"structured_outputs.{kind}" for kind in "json regex choice grammar json_object".split())]
)
_NVEXT = """nvext nvext.guided_json nvext.guided_regex nvext.guided_choice nvext.guided_grammar nvext.ignore_eos
    nvext.top_k nvext.min_p nvext.repetition_penalty nvext.max_thinking_tokens"""
_GRAMMARS = f"""{_FORMAT} {_STRUCTURED} {_NVEXT} guided_json guided_regex guided_choice guided_grammar
    regex ebnf grammar json_schema"""
_SAMPLING = """temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed stop
    stop_token_ids ignore_eos min_tokens logit_bias allowed_token_ids include_stop_str_in_output no_stop_trim
    skip_special_tokens truncate_prompt_tokens priority cache_salt"""
_STREAM = "stream stream_options stream_options.include_usage stream_options.continuous_usage_stats"
_THINKING = """reasoning_effort thinking_token_budget enable_thinking thinking thinking.type thinking.budget_tokens
    chat_template_kwargs"""
_TURN = "add_generation_prompt continue_final_message"

# Without effect on the answer, in whatever interface they are given.
_IGNORED = {
    "who asks, and for what": """user safety_identifier request_id rid session_id custom_labels prompt_cache_key""",
    "the prefix cache finds by itself what it holds": """prompt_cache_options prompt_cache_retention cache_prompt
        extra_key""",
    "nothing is stored or billed": "store service_tier",
    "which replica or slot answers": """data_parallel_rank routed_dp_rank disagg_prefill_dp_rank bootstrap_host
        bootstrap_port bootstrap_room id_slot slot_id provider models route""",
    "drafts come from the model itself, and do not change answers": """prediction ngram_corpus_id speculative
        speculative.n_max speculative.n_min speculative.p_min""",
    "a setting of a sampling method that is refused": """mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold
        dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers repeat_last_n penalize_nl""",
    "one compiler takes all grammars": """guided_decoding_backend structured_outputs.disable_fallback
        structured_outputs._backend nvext.guided_decoding_backend grammar_triggers""",
    "the model has no such control": "verbosity",
    "the format is enforced, not described": "response_format.json_schema.description",
    "counts are in usage": """usage return_cached_tokens_details timings_per_token return_progress
        nvext.annotations""",
    "chunks come as they are made": "stream_reasoning stream_interval",
    "special tokens are left out, or come without spaces": "spaces_between_special_tokens",
    "only of endpoints that render": "return_token_offsets return_mm_kwargs",
}
_REFUSED = {
    "no such sampling method": """typical_p=1 tfs_z=1 top_a=0 top_n_sigma=-1=0 mirostat=0 dynatemp_range=0
        xtc_probability=0 dry_multiplier=0 repeat_penalty=1 epsilon_cutoff=0 eta_cutoff=0 smoothing_factor=0 watermark
        watermarking use_beam_search early_stopping length_penalty=1 samplers sampler_seq min_keep=0
        repetition_detection adaptive_target=-1 nvext.greed_sampling""",
    "no code or method of a client's runs here": """custom_logit_processor custom_params logits_processors
        vllm_xargs plugins transforms""",
    "texts are stopped at strings and tokens": "stop_regex bad_words bad_words_ids",
    "use max_tokens": "n_predict=-1 t_max_predict_ms=0 max_new_tokens max_length",
    "the prompt is what the interface says": """input_ids prompt_embeds images images_config mm_processor_kwargs
        media_io_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video n_keep=0 nvext.use_raw_prompt
        nvext.token_data""",
    "a prompt is cut on its left": "truncation_side=left",
    "name the adapter as model": "lora lora_path adapter_id nvext.lora",
    "sessions and caches of other servers do not exist here": """session_params kv_transfer_params
        ec_transfer_params kv_transfer""",
    "the answer does not carry it": """return_hidden_states return_routed_experts routed_experts_start_len=0
        routed_experts_prompt_start=0 return_meta_info return_prompt_text return_prompt_token_ids logprob_token_ids
        return_tokens_as_token_ids return_tokens n_probs=0 post_sampling_probs response_fields
        decoder_input_details details""",
    "structural tags are not read": "structured_outputs.structural_tag structural_tag",
    "JSON is laid out freely, with the properties that the schema declares": """guided_whitespace_pattern
        structured_outputs.whitespace_pattern structured_outputs.disable_any_whitespace
        structured_outputs.disable_additional_properties nvext.guided_whitespace_pattern""",
    "a grammar holds from the first token of the answer": "grammar_lazy",
    "no other model looks at the text": "moderation",
}
_REFUSED_WITH_TEXT = _merged(_REFUSED, {"thinking and answer come apart": "separate_reasoning=true"})
_CHAT_REFUSED = {
    "the template is the checkpoint's own": "chat_template documents",
    "the model reads and writes only text": "audio modalities=text web_search_options",
    "thinking and answer come apart": "separate_reasoning=true reasoning_format=auto=deepseek thinking_forced_open",
    "calls are parsed": "parse_tool_calls=true",
    "use thinking_token_budget": "thinking_budget thinking_budget_tokens reasoning_budget=-1 max_thinking_tokens",
    "only the answer comes back": "echo",
    "the chat template writes the special tokens": "add_special_tokens",
    "offer tools in the field tools": "messages[].tools",
    "not this model's": "task",
}

CHAT = FieldTable(
    done=f"""model messages messages[].role messages[].content messages[].content[].type messages[].content[].text
        messages[].content[].value messages[].content[].refusal messages[].content[].thinking messages[].refusal
        messages[].reasoning_content messages[].reasoning messages[].name messages[].tool_call_id messages[].tool_calls
        messages[].tool_calls[].id messages[].tool_calls[].type messages[].tool_calls[].function
        messages[].tool_calls[].custom messages[].function_call messages[].prefix messages[].partial
        messages[].content[].image_url messages[].content[].input_audio messages[].content[].audio_url
        messages[].content[].video_url messages[].content[].file messages[].content[].image messages[].content[].video
        {_STREAM} max_tokens max_completion_tokens n {_SAMPLING} {_GRAMMARS} {_THINKING} {_TURN}
        logprobs top_logprobs prompt_logprobs return_token_ids include_reasoning
        reasoning reasoning.effort reasoning.max_tokens reasoning.exclude reasoning.enabled
        tools tools[].type tools[].function tools[].function.name tools[].function.description
        tools[].function.parameters tools[].function.strict tools[].custom tools[].name tools[].description
        tools[].parameters tools[].strict tools[].input_schema tools[].format tools[].tools tools[].execution
        tool_choice parallel_tool_calls functions function_call""",
    ignored=_merged(
        _IGNORED,
        {
            "the prefix cache finds by itself what it holds": """messages[].content[].cache_control
                messages[].cache_control tools[].cache_control tools[].function.cache_control
                messages[].content[].prompt_cache_breakpoint""",
            "who asks, and for what": "metadata",
            "chunks come as they are made": "stream_options.include_obfuscation",
            "the whole thinking is returned": "reasoning.summary",
            "not part of what was said": """messages[].annotations messages[].reasoning_details messages[].id
                messages[].audio
                messages[].tool_calls[].index""",
        },
    ),
    refused=_merged(_REFUSED, _CHAT_REFUSED),
)
COMPLETIONS = FieldTable(
    done=f"""model prompt {_STREAM} max_tokens n best_of {_SAMPLING} {_GRAMMARS} logprobs prompt_logprobs
        return_token_ids echo suffix add_special_tokens""",
    ignored=_merged(
        _IGNORED,
        {
            "who asks, and for what": "metadata",
            "chunks come as they are made": "stream_options.include_obfuscation",
            "a text has no thinking to switch": f"{_THINKING} reasoning include_reasoning",
        },
    ),
    refused=_REFUSED,
)
_SERVER_TOOLS = "of a tool that the server does not run"
RESPONSES = FieldTable(
    done=f"""model input input[].type input[].role input[].content input[].content[].type input[].content[].text
        input[].content[].refusal input[].call_id input[].name input[].namespace input[].arguments input[].input
        input[].output input[].output[].type input[].output[].text input[].summary input[].summary[].type
        input[].summary[].text input[].id input[].action input[].actions input[].operation input[].queries
        input[].encrypted_content input[].text input[].code input[].error input[].execution input[].outputs
        input[].result input[].results input[].server_label input[].tools input[].max_output_length
        input[].output[].outcome input[].output[].stderr input[].output[].stdout input[].output.type
        input[].content[].image_url input[].content[].file_data input[].content[].file_id input[].content[].file_url
        input[].content[].filename input[].output[].image_url input[].output[].file_data input[].output[].file_id
        input[].output[].file_url input[].output[].filename input[].output.image_url input[].output.file_id
        instructions stream stream_options max_output_tokens {_SAMPLING} {_GRAMMARS} {_TURN} top_logprobs include
        metadata tools tool_choice parallel_tool_calls reasoning reasoning.effort text text.format text.format.type
        text.format.name text.format.schema text.format.strict
        reasoning.max_tokens reasoning.enabled {_THINKING}""",
    ignored=_merged(
        _IGNORED,
        {
            "nothing is stored or billed": "access_programs background_options client_metadata",
            "a prompt is never cut": "truncation",
            "the whole thinking is returned": """reasoning.summary reasoning.generate_summary reasoning.context
                reasoning.mode""",
            "the model has no such control": "text.verbosity image",
            "the format is enforced, not described": "text.format.description",
            "counts are in usage": "stream_options.include_usage",
            "chunks come as they are made": "stream_options.include_obfuscation",
            "the server runs no tools": "max_tool_calls",
            "not part of what was said": """input[].status input[].phase input[].content[].annotations
                input[].content[].logprobs input[].content[].detail input[].created_by
                input[].internal_chat_message_metadata_passthrough input[].fingerprint""",
            "the prefix cache finds by itself what it holds": """input[].content[].prompt_cache_breakpoint
                input[].output[].prompt_cache_breakpoint""",
            _SERVER_TOOLS: """input[].acknowledged_safety_checks input[].approval_request_id input[].approve
                input[].async input[].background input[].caller input[].container_id input[].environment
                input[].output_format input[].pending_safety_checks input[].quality input[].reason input[].reasoning
                input[].revised_prompt input[].size input[].svg_usage input[].output[].detail""",
        },
    ),
    refused=_merged(
        _REFUSED_WITH_TEXT,
        {
            "the answer does not carry it": """return_token_ids prompt_logprobs logprobs include_reasoning=true
                enable_response_messages""",
            "there is one answer": "n=1",
            "nothing is stored between requests; send the whole conversation as input": """previous_response_id
                conversation previous_input_messages""",
            "an answer ends when its connection is closed": "background",
            "no prompts are stored here; send the text as input": "prompt",
            "the input is read as it is": "context_management",
            "the template is the checkpoint's own": "chat_template documents",
        },
    ),
)
_ANTHROPIC_PROMPT = """model messages messages[].role messages[].content messages[].content[].type
    messages[].content[].text messages[].content[].thinking messages[].content[].data messages[].content[].id
    messages[].content[].name messages[].content[].input messages[].content[].tool_use_id messages[].content[].content
    messages[].content[].content.* messages[].content[].content[].* messages[].content[].is_error
    messages[].content[].context messages[].content[].title messages[].content[].source
    system system[].type system[].text tools tools[].name tools[].description tools[].input_schema tools[].type
    tools[].strict tools[].input_examples tool_choice tool_choice.type tool_choice.name
    tool_choice.disable_parallel_tool_use
    thinking thinking.type thinking.budget_tokens output_config output_config.effort output_config.format
    output_config.format.type output_config.format.schema"""
_BLOCK_MARKS = {
    "the prefix cache finds by itself what it holds": """cache_control system[].cache_control tools[].cache_control
        messages[].content[].cache_control messages[].content[].content[].cache_control""",
    "not part of what was said": """messages[].content[].signature messages[].content[].citations
        messages[].content[].caller messages[].content[].content[].citations system[].citations messages[].id
        messages[].clear_at messages[].output_config""",
    _SERVER_TOOLS: """messages[].content[].encrypted_content messages[].content[].file_id
        messages[].content[].from messages[].content[].to messages[].content[].server_name
        messages[].content[].mcp_server_name messages[].content[].tool messages[].content[].tool_changes
        messages[].content[].tools messages[].content[].toolset_name messages[].content[].transformations
        messages[].content[].trigger tools[].tools tools[].url_sources
        tools[].allowed_callers tools[].defer_loading tools[].eager_input_streaming tools[].max_uses
        tools[].allowed_domains tools[].blocked_domains tools[].user_location tools[].citations
        tools[].max_content_tokens tools[].display_width_px tools[].display_height_px tools[].display_number
        tools[].enable_zoom tools[].max_characters tools[].mcp_server_name tools[].configs tools[].default_config
        tools[].response_inclusion tools[].use_cache tools[].model tools[].caching tools[].max_tokens""",
}
_MESSAGES_IGNORED = _merged(
    {
        "who asks, and for what": "metadata user_profile_id workspace_id diagnostics betas",
        "nothing is stored or billed": "inference_geo billing_policy fallback_credit_token speed",
        "no other model stands by": "fallbacks",
        "the template drops earlier thinking by itself": """context_management.edits[].keep
            context_management.edits[].trigger context_management.edits[].clear_at_least
            context_management.edits[].clear_tool_inputs context_management.edits[].exclude_tools
            context_management.edits[].instructions context_management.edits[].pause_after_compaction""",
        "the whole thinking is returned": "thinking.display thinking.block_binding",
        "the model has no such control": "output_config.task_budget",
    },
    _BLOCK_MARKS,
)
_MESSAGES_REFUSED = {
    "the server runs no tools": "container mcp_servers",
    "nothing is stored between requests": "thread",
    "the messages are read as they are": "compaction context_management.edits[].type=clear_thinking_20251015",
    "the template is the checkpoint's own": "chat_template documents",
    "the answer does not carry it": "logprobs top_logprobs prompt_logprobs return_token_ids include_reasoning=true",
    "there is one answer": "n=1",
}
MESSAGES = FieldTable(
    done=f"""{_ANTHROPIC_PROMPT} max_tokens stream stop_sequences {_SAMPLING} {_GRAMMARS} {_TURN}
        enable_thinking thinking_token_budget chat_template_kwargs reasoning_effort
        output_format output_format.type output_format.schema
        context_management context_management.edits parallel_tool_calls""",
    ignored=_merged(_IGNORED, _MESSAGES_IGNORED),
    refused=_merged(_REFUSED_WITH_TEXT, _MESSAGES_REFUSED),
)
_NOT_COUNTED = f"max_tokens stream stop_sequences {_SAMPLING} {_GRAMMARS}".replace("truncate_prompt_tokens", "")
COUNT_TOKENS = FieldTable(
    done=f"""{_ANTHROPIC_PROMPT} {_TURN} enable_thinking thinking_token_budget chat_template_kwargs reasoning_effort
        output_format output_format.type output_format.schema context_management context_management.edits
        parallel_tool_calls""",
    ignored=_merged(_IGNORED, _MESSAGES_IGNORED, {"counting samples nothing": _NOT_COUNTED}),
    refused=_merged(_REFUSED_WITH_TEXT, _MESSAGES_REFUSED, {"a prompt is counted whole": "truncate_prompt_tokens"}),
)
TOKENIZE = FieldTable(
    done=f"""model prompt messages tools {_TURN} chat_template_kwargs enable_thinking add_special_tokens
        return_token_strs""",
    ignored={
        "who asks, and for what": "user request_id",
        "the tools that are offered are in the prompt": "tool_choice",
    },
    refused={
        "the template is the checkpoint's own": "chat_template documents",
        "the prompt is what the interface says": "mm_processor_kwargs media_io_kwargs",
    },
)
DETOKENIZE = FieldTable(done="model tokens")
LOAD_ADAPTER = FieldTable(
    done="lora_name lora_path load_inplace", refused={"not a form of adapters here": "is_3d_lora_weight"}
)
UNLOAD_ADAPTER = FieldTable(done="lora_name", ignored={"a name stands for one adapter": "lora_int_id"})


# Values that ask for nothing where an interface does not have the field.
_NEUTRAL = {"n": (1,), "best_of": (1,), "parallel_tool_calls": (True,), "tool_choice": ("auto", "none")}


def _refuse_others(*tables: FieldTable) -> None:
    """What one interface does or refuses and another does not have is refused there: it was meant to change the
    answer.
    """
    rules = {
        name: rule
        for table in tables
        for name, rule in table.paths()
        if "." not in name and "[" not in name and rule.treatment != "ignored"
    }
    for name, rule in rules.items():
        neutral = (*_NEUTRAL.get(name, ()), *rule.neutral)
        for table in tables:
            if table.rule(name) is None:
                table.add(name, FieldRule("refused", "a field of another interface", neutral))


_refuse_others(CHAT, COMPLETIONS, RESPONSES, MESSAGES)
FIELD_TABLES: Mapping[str, FieldTable] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/v1/load_lora_adapter": LOAD_ADAPTER,
    "/v1/unload_lora_adapter": UNLOAD_ADAPTER,
}
