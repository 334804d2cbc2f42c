/* The known templates: how each renders, and the fingerprints by which they are recognised.
 *
 * To add one: put its text, as its model publishes it, into tests/fixtures/chat/, run make_chat.py, and
 * run test_chat, which says the fingerprint that it misses here. The form must then give what
 * Jinja gave, on every conversation there. */
#include "engine/chat_int.h"

const char *const chat_family_names[CHAT_FAMILY_COUNT] = {
    [CHAT_CHATML] = "chatml",   [CHAT_LLAMA2] = "llama-2", [CHAT_LLAMA3] = "llama-3",
    [CHAT_MISTRAL] = "mistral", [CHAT_GEMMA] = "gemma",    [CHAT_PHI3] = "phi-3",
    [CHAT_ZEPHYR] = "zephyr",
};

/* clang-format off */
static const struct chat_form chatml = {
    .family = CHAT_CHATML,
    .system = SYSTEM_ANYWHERE,
    .open = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
    .close = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
    .generation = "<|im_start|>assistant\n",
};

static const struct chat_form llama2 = {
    .family = CHAT_LLAMA2,
    .system = SYSTEM_IN_USER,
    .alternate = true,
    .trim = {true, true, true},
    .open = {"<<SYS>>\n", "{bos}[INST] ", " "},
    .close = {"\n<</SYS>>\n\n", " [/INST]", " {eos}"},
};

#define LLAMA3_HEADER(role) "<|start_header_id|>" role "<|end_header_id|>\n\n"
#define LLAMA3_TURNS                                                                            \
    .trim = {true, true, true}, .begin = "{bos}", .generation = LLAMA3_HEADER("assistant"),     \
    .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"}

static const struct chat_form llama3 = {
    .family = CHAT_LLAMA3,
    .system = SYSTEM_ANYWHERE,
    .open = {LLAMA3_HEADER("system"), LLAMA3_HEADER("user"), LLAMA3_HEADER("assistant")},
    LLAMA3_TURNS,
};

static const struct chat_form llama3_always = {
    .family = CHAT_LLAMA3,
    .system = SYSTEM_ANYWHERE,
    .generation_always = true,
    .open = {LLAMA3_HEADER("system"), LLAMA3_HEADER("user"), LLAMA3_HEADER("assistant")},
    LLAMA3_TURNS,
};

static const struct chat_form llama31 = {
    .family = CHAT_LLAMA3,
    .system = SYSTEM_FIRST,
    .default_system = "",
    .open = {LLAMA3_HEADER("system") "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
             LLAMA3_HEADER("user"), LLAMA3_HEADER("assistant")},
    LLAMA3_TURNS,
};

static const struct chat_form llama32 = {
    .family = CHAT_LLAMA3,
    .system = SYSTEM_FIRST,
    .default_system = "",
    .open = {LLAMA3_HEADER("system") "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n",
             LLAMA3_HEADER("user"), LLAMA3_HEADER("assistant")},
    LLAMA3_TURNS,
};

static const struct chat_form mistral_v01 = {
    .family = CHAT_MISTRAL,
    .system = SYSTEM_REFUSED,
    .alternate = true,
    .begin = "{bos}",
    .open = {"", "[INST] ", ""},
    .close = {"", " [/INST]", "{eos} "},
};

static const struct chat_form mistral_v02 = {
    .family = CHAT_MISTRAL,
    .system = SYSTEM_REFUSED,
    .alternate = true,
    .begin = "{bos}",
    .open = {"", "[INST] ", ""},
    .close = {"", " [/INST]", "{eos}"},
};

static const struct chat_form mistral_system = {
    .family = CHAT_MISTRAL,
    .system = SYSTEM_IN_USER,
    .alternate = true,
    .begin = "{bos}",
    .open = {"", " [INST] ", " "},
    .close = {"\n\n", " [/INST]", "{eos}"},
};

static const struct chat_form mistral_v03 = {
    .family = CHAT_MISTRAL,
    .system = SYSTEM_IN_LAST,
    .alternate = true,
    .trim = {false, false, true},
    .begin = "{bos}",
    .open = {"", "[INST] ", " "},
    .close = {"\n\n", "[/INST]", "{eos}"},
};

static const struct chat_form gemma = {
    .family = CHAT_GEMMA,
    .system = SYSTEM_REFUSED,
    .alternate = true,
    .trim = {true, true, true},
    .begin = "{bos}",
    .open = {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},
    .close = {"", "<end_of_turn>\n", "<end_of_turn>\n"},
    .generation = "<start_of_turn>model\n",
};

#define PHI3_TURNS                                                                              \
    .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},                                  \
    .close = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},                                           \
    .generation = "<|assistant|>\n", .end = "{eos}"

static const struct chat_form gemma_first = {
    .family = CHAT_GEMMA,
    .system = SYSTEM_REFUSED,
    .alternate = true,
    .trim = {true, true, true},
    .open = {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},
    .close = {"", "<end_of_turn>\n", "<end_of_turn>\n"},
    .generation = "<start_of_turn>model\n",
};

static const struct chat_form phi3 = {
    .family = CHAT_PHI3,
    .system = SYSTEM_ANYWHERE,
    PHI3_TURNS,
};

static const struct chat_form phi35 = {
    .family = CHAT_PHI3,
    .system = SYSTEM_ANYWHERE,
    .empty_system_dropped = true,
    PHI3_TURNS,
};

/* A user's turn opens the assistant's; a system message would be dropped. */
static const struct chat_form phi3_first = {
    .family = CHAT_PHI3,
    .system = SYSTEM_REFUSED,
    .begin = "{bos}",
    .open = {"", "<|user|>\n", ""},
    .close = {"", "<|end|>\n<|assistant|>\n", "<|end|>\n"},
};

static const struct chat_form phi3_medium = {
    .family = CHAT_PHI3,
    .system = SYSTEM_REFUSED,
    .open = {"", "<|user|>\n", ""},
    .close = {"", "<|end|>\n<|assistant|>\n", "<|end|>\n"},
};

static const struct chat_form zephyr = {
    .family = CHAT_ZEPHYR,
    .system = SYSTEM_ANYWHERE,
    .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
    .close = {"{eos}\n", "{eos}\n", "{eos}\n"},
    .generation = "<|assistant|>\n",
};

static const struct {
    uint64_t fingerprint;
    const struct chat_form *form;
} known[] = {
    {0x3aa808574d519458, &chatml}, /* OpenHermes, and most others that say ChatML */
    {0x831b8d9f63586ca9, &chatml}, /* Yi, Nous Hermes, Dolphin */
    {0xb3b6b373ca5544d8, &chatml}, /* SmolLM2, Qwen2 */
    {0x96c6cd1184fd03c3, &chatml}, /* Qwen2.5 */
    {0x8e08a5bac286bedc, &llama2}, /* Llama 2 Chat */
    {0x8c5cc0517067ad77, &llama3}, /* Llama 3 Instruct */
    {0x5ef7ccfbc02b4782, &llama3_always}, /* Llama 3 Instruct, as first published */
    {0x4daeebac7fb499ac, &llama31}, /* Llama 3.1, 3.3 Instruct */
    {0x86c4ad544a603a4b, &llama32}, /* Llama 3.2 Instruct */
    {0xa90bc77ced310e56, &mistral_v01}, /* Mistral 7B Instruct v0.1 */
    {0x2fb1266f25da1f65, &mistral_v02}, /* Mistral 7B Instruct v0.2, Mixtral */
    {0x6566a581e3545c29, &mistral_system}, /* both, as published later */
    {0x9423f7e200fc86ac, &mistral_v03}, /* Mistral 7B Instruct v0.3 */
    {0xdd81420b962ac7ef, &gemma}, /* Gemma, Gemma 2 */
    {0xb37a2ad174c830e7, &gemma_first}, /* Gemma, as first published */
    {0xc8f26a40d194ce08, &phi3}, /* Phi-3 mini */
    {0x973291542c8d8b39, &phi35}, /* Phi-3.5 mini */
    {0x1ae6664501f38439, &phi3_first}, /* Phi-3 mini, as first published */
    {0xf8c7c02d1d94a531, &phi3_medium}, /* Phi-3 medium */
    {0x346015b03017c5d4, &zephyr}, /* Zephyr, TinyLlama */
};
/* clang-format on */

const struct chat_form *chat_form_find(uint64_t fingerprint)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].fingerprint == fingerprint) return known[i].form;
    return NULL;
}

const struct chat_form *chat_form_of_family(enum chat_family family)
{
    static const struct chat_form *const forms[CHAT_FAMILY_COUNT] = {
        [CHAT_CHATML] = &chatml,       [CHAT_LLAMA2] = &llama2, [CHAT_LLAMA3] = &llama3,
        [CHAT_MISTRAL] = &mistral_v02, [CHAT_GEMMA] = &gemma,   [CHAT_PHI3] = &phi3,
        [CHAT_ZEPHYR] = &zephyr,
    };
    return forms[family];
}
