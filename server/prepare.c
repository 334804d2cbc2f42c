/* A job's adapters and tokens. */
#include "server/adapters.h"
#include "server/job.h"
#include "server/prompt.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

bool job_name_adapters(struct job *j)
{
    for (size_t i = 0; i < j->request.adapter_count; i++) {
        struct adapter_choice *c = &j->request.adapters[i];
        char name[ADAPTER_NAME_MAX + 1];
        if (c->name) continue;
        if (registry_name(j->service->registry, TENANT, c->number, name))
            api_error_set(&j->error, 404, "model_not_found", "lora",
                          "there is no adapter with id %lld: see GET /lora-adapters", (long long)c->number);
        else if (!(c->name = strdup(name)))
            api_error_from(&j->error, ST_NOMEM, NULL, NULL);
        if (j->error.http) return false;
    }
    return true;
}

bool job_try_leases(struct job *j)
{
    bool all = true;
    for (size_t i = 0; i < j->request.adapter_count; i++) {
        const struct adapter_choice *c = &j->request.adapters[i];
        if (registry_try_lease(j->service->registry, TENANT, c->name, c->version, &j->leases[i])) all = false;
    }
    return all;
}

static void lease_failed(struct job *j, const struct adapter_choice *c, enum status st,
                         const struct error *cause)
{
    const char *param = j->request.adapter_param;
    if (st != ST_NOT_FOUND)
        api_error_from(&j->error, st, cause, param);
    else if (c->version)
        api_error_set(&j->error, 404, "model_not_found", param,
                      "there is no adapter '%.128s' with version '%.40s'", c->name, c->version);
    else
        adapter_not_found(&j->error, c->name, param);
}

/* Those that job_try_leases could not have without blocking. */
static bool take_leases(struct job *j)
{
    for (size_t i = 0; i < j->request.adapter_count; i++) {
        const struct adapter_choice *c = &j->request.adapters[i];
        struct error cause = {0};
        enum status st = ST_OK;
        if (!j->leases[i])
            st = registry_lease(j->service->registry, TENANT, c->name, c->version, &j->leases[i], &cause);
        if (st) {
            lease_failed(j, c, st, &cause);
            return false;
        }
    }
    return true;
}

struct chosen {
    const struct adapter_view *view;
    float weight;
};

/* By version, then by weight, so that equal sets come in one order. */
static int compare_chosen(const void *a, const void *b)
{
    const struct chosen *p = a, *q = b;
    int order = key128_compare(p->view->key, q->view->key);
    return order ? order : (p->weight > q->weight) - (p->weight < q->weight);
}

/* "fp_<model>", and with adapters "_<digest of names, versions and weights>": equal after a restart. */
static void name_set(struct job *j, const struct chosen *set, size_t count)
{
    struct strbuf text = {0};
    unsigned char digest[crypto_generichash_BYTES_MIN];
    char hex[sizeof digest * 2 + 1];
    for (size_t i = 0; i < count; i++)
        strbuf_printf(&text, "%s@%s*%.9g,", set[i].view->name, set[i].view->version, (double)set[i].weight);
    crypto_generichash(digest, sizeof digest, (const unsigned char *)(text.data ? text.data : ""), text.size,
                       NULL, 0);
    sodium_bin2hex(hex, sizeof hex, digest, sizeof digest);
    snprintf(j->fingerprint, sizeof j->fingerprint, "fp_%s%s%.12s",
             engine_shape(j->service->engine)->fingerprint, count ? "_" : "", count ? hex : "");
    strbuf_release(&text);
}

/* The set in canonical order, without members of weight 0, which are the base. */
static void resolve_set(struct job *j)
{
    struct chosen set[COMPLETION_ADAPTERS_MAX];
    size_t count = 0;
    for (size_t i = 0; i < j->request.adapter_count; i++) {
        const struct adapter_view *view = lease_view(j->leases[i]);
        float weight = j->request.adapters[i].weight;
        strbuf_printf(&j->versions, "%s%s@%s", i ? ", " : "", view->name, view->version);
        if (weight != 0) set[count++] = (struct chosen){view, weight};
    }
    qsort(set, count, sizeof *set, compare_chosen);
    struct set_member keyed[COMPLETION_ADAPTERS_MAX];
    for (size_t i = 0; i < count; i++) {
        j->members[i] = (struct lr_member){&set[i].view->lr, set[i].weight};
        keyed[i] = (struct set_member){set[i].view->key, set[i].weight};
    }
    j->member_count = count;
    j->set_key = set_key(j->service->set_secret, keyed, count);
    j->cache_salt = salt_key(j->service->set_secret, TENANT, j->request.cache_salt);
    name_set(j, set, count);
}

/* Every id the request names must be one of the model's. The parameter at fault, or NULL. */
static const char *foreign_token(const struct completion_request *r, int32_t vocab, int32_t *id_out)
{
    size_t prompt = r->tokens.rows ? r->tokens.end[r->tokens.rows - 1] : 0;
    for (size_t i = 0; i < prompt; i++)
        if ((*id_out = r->tokens.ids[i]) >= vocab) return "prompt";
    for (size_t i = 0; i < r->bias_count; i++)
        if ((*id_out = r->bias[i].token) >= vocab) return "logit_bias";
    for (size_t i = 0; i < r->stop_token_count; i++)
        if ((*id_out = r->stop_token_ids[i]) >= vocab) return "stop_token_ids";
    return NULL;
}

static bool check_tokens(struct job *j)
{
    int32_t vocab = (int32_t)engine_shape(j->service->engine)->vocab, id;
    const char *param = foreign_token(&j->request, vocab, &id);
    if (param)
        api_error_set(&j->error, 400, "invalid_value", param,
                      "'%s': token %d is not one of the model's 0 to %d", param, id, vocab - 1);
    return !param;
}

static enum status prepare_text(struct job *j, struct job_prompt *p, const char *text)
{
    unsigned flags = TOKENIZE_PARSE_SPECIAL | (j->request.add_special_tokens ? TOKENIZE_ADD_SPECIAL : 0);
    if (j->request.echo) strbuf_puts(&p->echo, text);
    return tokenizer_encode(engine_tokenizer(j->service->engine), text, strlen(text), flags, &p->tokens);
}

static enum status prepare_tokens(struct job *j, struct job_prompt *p, const int32_t *ids, size_t count)
{
    enum status st = ST_OK;
    for (size_t i = 0; i < count && !st; i++) st = token_list_push(&p->tokens, ids[i]);
    if (st || !j->request.echo) return st;
    return tokenizer_decode(engine_tokenizer(j->service->engine), ids, count,
                            j->request.skip_special_tokens ? DETOKENIZE_SKIP_SPECIAL : 0, &p->echo);
}

static enum status prepare_chat(struct job *j, struct job_prompt *p, struct error *cause)
{
    const struct completion_request *r = &j->request;
    struct chat_prompt chat = {r->messages, r->message_count, r->chat_template, r->add_generation_prompt,
                               r->continue_final_message};
    return prompt_render(j->service->engine, &chat, r->add_special_tokens ? TOKENIZE_ADD_SPECIAL : 0,
                         &p->tokens, cause);
}

static enum status prepare_prompt(struct job *j, size_t i, struct error *cause)
{
    const struct completion_request *r = &j->request;
    struct job_prompt *p = &j->prompts[i];
    size_t start = i && r->tokens.rows ? r->tokens.end[i - 1] : 0;
    enum status st = r->chat          ? prepare_chat(j, p, cause)
                     : r->tokens.rows ? prepare_tokens(j, p, r->tokens.ids + start, r->tokens.end[i] - start)
                                      : prepare_text(j, p, r->texts[i]);
    if (st)
        return cause->message[0]
                   ? st
                   : error_set(cause, st, "the prompt cannot be tokenised: %s", status_text(st));
    if (p->echo.failed) return error_set(cause, ST_NOMEM, "out of memory");
    if (!p->tokens.count) return error_set(cause, ST_INVALID, "'prompt' is empty: it has no tokens");
    return ST_OK;
}

void job_prepare(struct job *j)
{
    const struct completion_request *r = &j->request;
    struct error cause = {0};
    if (!check_tokens(j) || !take_leases(j)) return;
    resolve_set(j);
    j->prompt_count = r->chat ? 1 : r->tokens.rows + r->text_count;
    j->sequence_count = j->prompt_count * (size_t)r->best_of;
    j->prompts = calloc(j->prompt_count, sizeof *j->prompts);
    j->sequences = calloc(j->sequence_count, sizeof *j->sequences);
    enum status st = j->prompts && j->sequences ? ST_OK : error_set(&cause, ST_NOMEM, "out of memory");
    for (size_t i = 0; i < j->prompt_count && !st; i++) st = prepare_prompt(j, i, &cause);
    if (st) api_error_from(&j->error, st, &cause, r->chat ? "messages" : "prompt");
}
