"""The fields that the interfaces publish: walked through their clients' types, or listed from their sources."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, NotRequired, Required, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict  # the clients' types are made with these


def paths(type_: Any) -> set[str]:
    """All fields of a TypedDict, at every depth: ``messages[].content[].text``."""
    return set(_walked(type_, "", ()))


def _walked(type_: Any, prefix: str, outer: tuple[Any, ...]) -> Iterator[str]:
    kind = get_origin(type_)
    if kind in (Required, NotRequired, Annotated):
        yield from _walked(get_args(type_)[0], prefix, outer)
    elif kind in (Union, types.UnionType):
        for option in get_args(type_):
            yield from _walked(option, prefix, outer)
    elif isinstance(type_, getattr(typing, "TypeAliasType", ())):
        yield from _walked(type_.__value__, prefix, outer)
    elif is_typeddict(type_):
        if type_ in outer:
            return
        for name, field in get_type_hints(type_, include_extras=True).items():
            path = f"{prefix}.{name}" if prefix else name
            yield path
            yield from _walked(field, path, (*outer, type_))
    elif kind is not None and kind is not dict and getattr(kind, "__name__", "") != "Mapping":
        for item in get_args(type_):
            if item is not Ellipsis:
                yield from _walked(item, f"{prefix}[]", outer)


def expanded(text: str) -> set[str]:
    """The paths of a text in which ``a(b c[](d))`` stands for a, a.b, a.c and a.c[].d."""
    found: set[str] = set()
    stack, last = [""], ""
    for token in re.findall(r"[^\s()]+|[()]", text):
        if token == "(":
            stack.append(last)
        elif token == ")":
            stack.pop()
        else:
            last = stack[-1] + token if token.startswith("[]") or not stack[-1] else f"{stack[-1]}.{token}"
            found.add(last.removesuffix("[]"))
    return found


# Anthropic's Python client 2.14.0: the parameters of messages, of their beta and of count_tokens.
ANTHROPIC = """
betas billing_policy(bill_to type) cache_control(ttl type) compaction(instructions type) container(id
skills[](skill_id type version)) context_management(edits[](clear_at_least(type value) clear_tool_inputs
exclude_tools instructions keep(type value) pause_after_compaction trigger(type value) type))
diagnostics(previous_message_id) fallback_credit_token(mode token) fallbacks[](max_tokens model output_config(effort
format(schema type) task_budget(remaining total type)) speed thinking(block_binding(prefix_mismatch_behavior)
budget_tokens display type)) inference_geo max_tokens mcp_servers[](authorization_token name
tool_configuration(allowed_tools enabled) type url) messages[](clear_at content[](cache_control(ttl type)
caller(tool_id type) citations(enabled [](cited_text document_index document_title encrypted_index end_block_index
end_char_index end_page_number search_result_index source start_block_index start_char_index start_page_number title
type url)) content(content(cache_control(ttl type) citations(enabled) context source(content[](cache_control(ttl
type) citations[](cited_text document_index document_title encrypted_index end_block_index end_char_index
end_page_number search_result_index source start_block_index start_char_index start_page_number title type url)
source(data file_id media_type type url) text transformations(oversized_image) type) data file_id media_type type
url) title type [](file_id type)) encrypted_content encrypted_stdout error_code error_message file_type
is_file_update lines new_lines new_start num_lines old_lines old_start retrieved_at return_code start_line stderr
stdout stop_reason text tool_references[](cache_control(ttl type) tool_name type) total_lines type url
[](cache_control(ttl type) citations(enabled [](cited_text document_index document_title encrypted_index
end_block_index end_char_index end_page_number search_result_index source start_block_index start_char_index
start_page_number title type url)) content[](cache_control(ttl type) citations[](cited_text document_index
document_title encrypted_index end_block_index end_char_index end_page_number search_result_index source
start_block_index start_char_index start_page_number title type url) text type) context encrypted_content page_age
source(content[](cache_control(ttl type) citations[](cited_text document_index document_title encrypted_index
end_block_index end_char_index end_page_number search_result_index source start_block_index start_char_index
start_page_number title type url) source(data file_id media_type type url) text transformations(oversized_image)
type) data file_id media_type type url) state_changes[](download_id error path size_bytes tab_id type url)
tabs[](active tab_id title url) text title tool_name transformations(oversized_image) type url)) context data
encrypted_content file_id from(model) id input is_error mcp_server_name name server_name signature
source(content[](cache_control(ttl type) citations[](cited_text document_index document_title encrypted_index
end_block_index end_char_index end_page_number search_result_index source start_block_index start_char_index
start_page_number title type url) source(data file_id media_type type url) text transformations(oversized_image)
type) data file_id media_type type url) text thinking title to(model) tool(definition(allowed_callers
allowed_domains blocked_domains cache_control(ttl type) caching(ttl type) citations(enabled)
configs(close_tab(defer_loading enabled) cursor_position(defer_loading enabled) double_click(defer_loading enabled)
file_upload(defer_loading enabled) find(defer_loading enabled) form_input(defer_loading enabled)
get_page_text(defer_loading enabled) hold_key(defer_loading enabled) hover(defer_loading enabled)
javascript_exec(defer_loading enabled) key(defer_loading enabled) left_click(defer_loading enabled)
left_click_drag(defer_loading enabled) left_mouse_down(defer_loading enabled) left_mouse_up(defer_loading enabled)
list_tabs(defer_loading enabled) middle_click(defer_loading enabled) mouse_move(defer_loading enabled)
navigate(defer_loading enabled) new_tab(defer_loading enabled) read_console(defer_loading enabled)
read_network(defer_loading enabled) read_page(defer_loading enabled) right_click(defer_loading enabled)
screenshot(defer_loading enabled) scroll(defer_loading enabled) scroll_to(defer_loading enabled)
switch_tab(defer_loading enabled) triple_click(defer_loading enabled) type(defer_loading enabled) wait(defer_loading
enabled) zoom(defer_loading enabled)) default_config(defer_loading enabled) defer_loading description
display_height_px display_number display_width_px eager_input_streaming enable_zoom input_examples
input_schema(properties required type) max_characters max_content_tokens max_tokens max_uses mcp_server_name model
name response_inclusion strict tools[](description input_schema name) type
url_sources(client_tool_results(tools[](name type) type) server_tool_results(tools[](name type) type)
user_input(type)) use_cache user_location(city country region timezone type)) name server_name type)
tool_changes[](cache_control(ttl type) tool(definition(allowed_callers allowed_domains blocked_domains
cache_control(ttl type) caching(ttl type) citations(enabled) configs(close_tab(defer_loading enabled)
cursor_position(defer_loading enabled) double_click(defer_loading enabled) file_upload(defer_loading enabled)
find(defer_loading enabled) form_input(defer_loading enabled) get_page_text(defer_loading enabled)
hold_key(defer_loading enabled) hover(defer_loading enabled) javascript_exec(defer_loading enabled)
key(defer_loading enabled) left_click(defer_loading enabled) left_click_drag(defer_loading enabled)
left_mouse_down(defer_loading enabled) left_mouse_up(defer_loading enabled) list_tabs(defer_loading enabled)
middle_click(defer_loading enabled) mouse_move(defer_loading enabled) navigate(defer_loading enabled)
new_tab(defer_loading enabled) read_console(defer_loading enabled) read_network(defer_loading enabled)
read_page(defer_loading enabled) right_click(defer_loading enabled) screenshot(defer_loading enabled)
scroll(defer_loading enabled) scroll_to(defer_loading enabled) switch_tab(defer_loading enabled)
triple_click(defer_loading enabled) type(defer_loading enabled) wait(defer_loading enabled) zoom(defer_loading
enabled)) default_config(defer_loading enabled) defer_loading description display_height_px display_number
display_width_px eager_input_streaming enable_zoom input_examples input_schema(properties required type)
max_characters max_content_tokens max_tokens max_uses mcp_server_name model name response_inclusion strict
tools[](description input_schema name) type url_sources(client_tool_results(tools[](name type) type)
server_tool_results(tools[](name type) type) user_input(type)) use_cache user_location(city country region timezone
type)) name server_name type) type) tool_use_id tools[](description input_schema name) toolset_name
transformations(oversized_image) trigger type) output_config(effort) role) metadata(user_id) model
output_config(effort format(schema type) task_budget(remaining total type)) service_tier speed stop_sequences stream
system[](cache_control(ttl type) citations[](cited_text document_index document_title encrypted_index
end_block_index end_char_index end_page_number search_result_index source start_block_index start_char_index
start_page_number title type url) text type) thinking(block_binding(prefix_mismatch_behavior) budget_tokens display
type) thread(previous_message_id type) tool_choice(disable_parallel_tool_use name type) tools[](allowed_callers
allowed_domains blocked_domains cache_control(ttl type) caching(ttl type) citations(enabled)
configs(close_tab(defer_loading enabled) cursor_position(defer_loading enabled) double_click(defer_loading enabled)
file_upload(defer_loading enabled) find(defer_loading enabled) form_input(defer_loading enabled)
get_page_text(defer_loading enabled) hold_key(defer_loading enabled) hover(defer_loading enabled)
javascript_exec(defer_loading enabled) key(defer_loading enabled) left_click(defer_loading enabled)
left_click_drag(defer_loading enabled) left_mouse_down(defer_loading enabled) left_mouse_up(defer_loading enabled)
list_tabs(defer_loading enabled) middle_click(defer_loading enabled) mouse_move(defer_loading enabled)
navigate(defer_loading enabled) new_tab(defer_loading enabled) read_console(defer_loading enabled)
read_network(defer_loading enabled) read_page(defer_loading enabled) right_click(defer_loading enabled)
screenshot(defer_loading enabled) scroll(defer_loading enabled) scroll_to(defer_loading enabled)
switch_tab(defer_loading enabled) triple_click(defer_loading enabled) type(defer_loading enabled) wait(defer_loading
enabled) zoom(defer_loading enabled)) default_config(defer_loading enabled) defer_loading description
display_height_px display_number display_width_px eager_input_streaming enable_zoom input_examples
input_schema(properties required type) max_characters max_content_tokens max_tokens max_uses mcp_server_name model
name response_inclusion strict tools[](description input_schema name) type
url_sources(client_tool_results(tools[](name type) type) server_tool_results(tools[](name type) type)
user_input(type)) use_cache user_location(city country region timezone type)) user_profile_id workspace_id
"""

# What vLLM's chat, completions and responses have beside OpenAI's (main in November 2026; and fields of 2025).
VLLM = """
thinking_token_budget include_reasoning use_beam_search top_k min_p repetition_penalty watermarking length_penalty
stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo
add_generation_prompt continue_final_message add_special_tokens documents chat_template chat_template_kwargs
media_io_kwargs mm_processor_kwargs structured_outputs(json regex choice grammar json_object disable_fallback
disable_any_whitespace disable_additional_properties whitespace_pattern structural_tag _backend) priority request_id
session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
return_prompt_text return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
stream_interval logits_processors guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
guided_whitespace_pattern structural_tag prompt_embeds stream_options(include_usage continuous_usage_stats)
"""
VLLM_RESPONSES = """
skip_special_tokens request_id mm_processor_kwargs priority cache_salt enable_response_messages
previous_input_messages top_k logit_bias include_stop_str_in_output repetition_penalty seed stop ignore_eos
structured_outputs presence_penalty frequency_penalty vllm_xargs
"""

# SGLang's chat and completions beside OpenAI's (main in November 2026).
SGLANG = """
return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details
return_prompt_token_ids return_token_ids return_meta_info task top_k min_p min_tokens regex ebnf json_schema
repetition_penalty stop_token_ids stop_regex no_stop_trim ignore_eos continue_final_message skip_special_tokens
lora_path session_id session_params separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch
min_dynamic_patch use_audio_in_video images_config custom_logit_processor custom_params input_ids rid extra_key
cache_salt ngram_corpus_id priority bootstrap_host bootstrap_port bootstrap_room routed_dp_rank
disagg_prefill_dp_rank data_parallel_rank custom_labels reasoning(effort enabled)
response_format(type json_schema(name description schema strict) schema)
"""

# llama.cpp's server beside OpenAI's.
LLAMA_CPP = """
grammar json_schema grammar_lazy grammar_triggers typical_p tfs_z top_n_sigma mirostat mirostat_tau mirostat_eta
dynatemp_range dynatemp_exponent xtc_probability xtc_threshold dry_multiplier dry_base dry_allowed_length
dry_penalty_last_n dry_sequence_breakers repeat_penalty repeat_last_n samplers min_keep n_predict n_keep n_probs
post_sampling_probs return_tokens response_fields t_max_predict_ms timings_per_token return_progress cache_prompt
id_slot lora reasoning_format thinking_forced_open parse_tool_calls chat_template_kwargs add_generation_prompt
response_format(schema)
"""

# NIM's and Dynamo's extension, and what OpenRouter and Hugging Face's servers take.
OTHERS = """
nvext(guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
ignore_eos top_k min_p repetition_penalty greed_sampling use_raw_prompt annotations token_data max_thinking_tokens)
reasoning(effort max_tokens exclude enabled) provider models route plugins transforms top_a usage
thinking(type budget_tokens) enable_thinking thinking_budget watermark adapter_id
messages[](reasoning reasoning_details prefix partial)
"""
