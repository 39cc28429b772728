"""Runs llama.cpp on exported files: `python llama_client.py JOB.json`, with a Python that has it.

It stands alone (numpy and llama_cpp only), because llama-cpp-python may live in an environment of
its own, and because llama.cpp ends the whole process where it finds a file broken.

The job: ``model`` and ``mmproj`` (files; mmproj may be null), ``images`` (an .npz with [H, W, 3]
uint8 arrays, or null), ``prompt`` (with "<image>" where an image stands), ``texts`` (to tokenise),
``n_new``, ``chat`` (a handler's name and messages, or absent), ``out`` (an .npz to write). The answer: ``text.N`` ids of each text, ``chunk.N`` ids of
each part of the prompt or features [tokens, width] of each view, ``logits`` [n_new, vocabulary]
and the ``new`` ids that were chosen greedily.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import llama_chat_format

F32 = 0  # ggml's number of the type


def main(job):
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=1024,
        n_batch=1024,
        n_ubatch=1024,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=False,
        type_k=F32,
        type_v=F32,
        verbose=bool(job.get("verbose")),
    )
    answer = {
        f"text.{i}": np.array(llama.tokenize(text.encode(), add_bos=True, special=True))
        for i, text in enumerate(job["texts"])
    }
    answer["chat_template"] = np.array(llama.metadata.get("tokenizer.chat_template", ""))
    if job.get("prompt") is not None:
        answer |= ask(llama, job)
    if job.get("chat") is not None:
        answer |= chat(llama, job)
    np.savez(job["out"], **answer)


def chat(llama, job):
    """What one of the binding's chat handlers answers, greedily, and the prompt that it makes."""
    handler = getattr(llama_chat_format, job["chat"]["handler"])(job["mmproj"], verbose=False)
    messages = job["chat"]["messages"]
    made = handler(
        llama=llama,
        messages=messages,
        temperature=0.0,
        repeat_penalty=1.0,
        max_tokens=job["n_new"],
    )
    system = {"role": "system", "content": handler.DEFAULT_SYSTEM_MESSAGE}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    prompt = environment.from_string(handler.CHAT_FORMAT).render(
        messages=[system, *messages], add_generation_prompt=True
    )
    content = made["choices"][0]["message"]["content"]
    return {"content": np.array(content), "prompt": np.array(prompt)}


def ask(llama, job):
    eye = None if job["mmproj"] is None else open_eye(llama, job)
    chunks = text_only(llama, job["prompt"]) if eye is None else split(eye, job)
    answer, n_past = {}, 0
    for i, chunk in enumerate(chunks):
        if isinstance(chunk, list):
            answer[f"chunk.{i}"] = np.array(chunk)
            feed(llama, chunk, n_past)
            n_past += len(chunk)
        else:
            answer[f"chunk.{i}"] = features = look(llama, eye, chunk)
            past = llama_cpp.llama_pos(n_past)
            code = mtmd.mtmd_helper_eval_chunk_single(
                eye, llama._ctx.ctx, chunk, past, 0, llama.n_batch, True, ctypes.byref(past)
            )
            assert code == 0, f"mtmd_helper_eval_chunk_single: {code}"
            assert past.value == n_past + len(features)
            n_past = past.value
    logits, new = [], []
    for _ in range(job["n_new"]):
        row = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
        logits.append(np.ctypeslib.as_array(row, (llama.n_vocab(),)).copy())
        new.append(int(logits[-1].argmax()))
        feed(llama, new[-1:], n_past)
        n_past += 1
    return answer | {"logits": np.array(logits), "new": np.array(new)}


def text_only(llama, prompt):
    return [llama.tokenize(prompt.encode(), add_bos=True, special=True)]


def feed(llama, ids, n_past):
    """Run text; logits are kept for the last token."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, n_past + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, i == len(ids) - 1
    code = llama_cpp.llama_decode(llama._ctx.ctx, batch)
    llama_cpp.llama_batch_free(batch)
    assert code == 0, f"llama_decode: {code}"


def open_eye(llama, job):
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.warmup, params.print_timings = False, 1, False, False
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    eye = mtmd.mtmd_init_from_file(job["mmproj"].encode(), llama.model, params)
    assert eye is not None, "mtmd_init_from_file refused the file"
    assert mtmd.mtmd_support_vision(eye)
    return eye


def split(eye, job):
    """The prompt as lists of ids and chunks of views."""
    images = [] if job["images"] is None else list(np.load(job["images"]).values())
    prompt = job["prompt"].replace("<image>", mtmd.mtmd_default_marker().decode()).encode()
    text = mtmd.mtmd_input_text(prompt, len(prompt), True, True)
    bitmaps = []
    for image in images:
        height, width, _ = image.shape
        data = np.ascontiguousarray(image).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmaps.append(mtmd.mtmd_bitmap_init(width, height, data))
    chunks = mtmd.mtmd_input_chunks_init()
    array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
    code = mtmd.mtmd_tokenize(eye, chunks, ctypes.byref(text), array, len(bitmaps))
    assert code == 0, f"mtmd_tokenize: {code}"
    found = []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            n = ctypes.c_size_t()
            ids = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
            found.append([ids[j] for j in range(n.value)])
        else:
            found.append(chunk)
    return found


def look(llama, eye, chunk):
    """Features of one view. [tokens, width]"""
    assert mtmd.mtmd_encode_chunk(eye, chunk) == 0
    shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), llama.n_embd())
    return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(eye), shape).copy()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
