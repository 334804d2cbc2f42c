/* A request becomes a job: checked, written down, queued. */
#include "training/jobs_int.h"

#include "base/file.h"
#include "training/dataset_int.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SUFFIX_MAX   64
#define METADATA_MAX (16 << 10)
#define HASH_HEX     65

/* A request on its way. */
struct submission {
    struct jobs *jobs;
    const char *tenant;
    const struct train_request *request;
    int64_t adapter_number;
    struct strbuf settings;
    char hash[HASH_HEX]; /* of all that the request says */
    char id[TRAIN_ID_MAX];
};

/* --- checks --- */

static enum status check_metadata(const char *text, struct error *err)
{
    cJSON *json = NULL;
    if (!text) return ST_OK;
    size_t n = strlen(text);
    if (n > METADATA_MAX)
        return error_set(err, ST_INVALID, "metadata: %zu bytes are more than %d", n, METADATA_MAX);
    enum status st = json_parse(text, n, &json, err);
    if (!st && !cJSON_IsObject(json)) st = error_set(err, ST_INVALID, "metadata must be an object");
    cJSON_Delete(json);
    return st;
}

static enum status check_request(const struct submission *s, struct error *err)
{
    const struct train_request *r = s->request;
    if (!r->examples == !r->file_id) return error_set(err, ST_INVALID, "give examples, or a file of them");
    if (r->suffix && strlen(r->suffix) > SUFFIX_MAX)
        return error_set(err, ST_INVALID, "suffix: more than %d bytes", SUFFIX_MAX);
    if (r->idempotency_key && (!*r->idempotency_key || strlen(r->idempotency_key) > TRAIN_KEY_MAX))
        return error_set(err, ST_INVALID, "idempotency_key: must have 1 to %d bytes", TRAIN_KEY_MAX);
    if (strlen(s->tenant) >= TENANT_MAX) return error_set(err, ST_INVALID, "the tenant's name is too long");
    if (r->examples && r->examples_size > s->jobs->config.file_bytes_max)
        return error_set(err, ST_TOO_LARGE, "%zu bytes of examples are more than %zu", r->examples_size,
                         s->jobs->config.file_bytes_max);
    enum status st = trainer_check(&r->settings, err);
    return st ? st : check_metadata(r->metadata, err);
}

/* The version is there, and the adapter's current one is the expected one. */
static enum status check_adapter(struct submission *s, struct error *err)
{
    const struct train_request *r = s->request;
    struct adapter_info info;
    struct version_files files;
    enum status st = registry_get(s->jobs->config.registry, s->tenant, r->adapter, &info, err);
    if (st) return st;
    s->adapter_number = info.number;
    const struct version_record *current = &info.versions[0].record;
    if (r->expected_version && strcmp(r->expected_version, current->version) != 0 &&
        strcmp(r->expected_version, current->hash) != 0)
        st = error_set(err, ST_CONFLICT, "the current version of '%s' is %s, not the expected '%.64s'",
                       r->adapter, current->version, r->expected_version);
    adapter_info_release(&info);
    if (st || !r->version) return st;
    st = registry_open_files(s->jobs->config.registry, s->tenant, r->adapter, r->version, &files, err);
    if (st) return st;
    close(files.config_fd);
    close(files.tensors_fd);
    return ST_OK;
}

static enum status check_examples(const struct submission *s, struct error *err)
{
    const struct train_request *r = s->request;
    struct error why = {0};
    struct dataset *d;
    if (!r->examples) return ST_OK;
    const struct dataset_rules rules = jobs_rules(s->jobs, &r->settings, "examples", &why);
    enum status st = dataset_read_bytes(&rules, r->examples, r->examples_size, &d, err);
    if (!st) dataset_free(d);
    return st;
}

static enum status check_files(const struct submission *s, struct error *err)
{
    const char *const ids[] = {s->request->file_id, s->request->validation_file_id};
    struct train_file file;
    enum status st = ST_OK;
    for (int i = 0; i < 2 && !st; i++)
        if (ids[i]) st = jobs_file_get(s->jobs, s->tenant, ids[i], &file, err);
    return st;
}

/* --- the same request again --- */

static void hash_part(crypto_generichash_state *hash, const char *bytes, size_t size)
{
    uint64_t length = bytes ? size : UINT64_MAX; /* so that parts cannot run into each other */
    crypto_generichash_update(hash, (const unsigned char *)&length, sizeof length);
    if (bytes) crypto_generichash_update(hash, (const unsigned char *)bytes, size);
}

static void hash_request(struct submission *s)
{
    const struct train_request *r = s->request;
    const char *const parts[] = {r->adapter,       r->version, r->expected_version,
                                 s->settings.data, r->file_id, r->validation_file_id,
                                 r->suffix,        r->metadata};
    unsigned char digest[(HASH_HEX - 1) / 2];
    crypto_generichash_state hash;
    crypto_generichash_init(&hash, NULL, 0, sizeof digest);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        hash_part(&hash, parts[i], parts[i] ? strlen(parts[i]) : 0);
    hash_part(&hash, r->examples, r->examples_size);
    crypto_generichash_final(&hash, digest, sizeof digest);
    sodium_bin2hex(s->hash, sizeof s->hash, digest, sizeof digest);
}

struct known {
    char id[TRAIN_ID_MAX], hash[HASH_HEX];
};

static enum status read_known(void *ctx, sqlite3_stmt *row)
{
    struct known *k = ctx;
    db_text(row, 0, k->id, sizeof k->id);
    db_text(row, 1, k->hash, sizeof k->hash);
    return ST_OK;
}

/* The job of the key, in s->id with *existing; ST_CONFLICT where that was of another request. */
static enum status find_key(struct submission *s, bool *existing, struct error *err)
{
    struct known k = {0};
    const char *key = s->request->idempotency_key;
    if (!key) return ST_OK;
    enum status st =
        db_run(s->jobs->db, err, read_known, &k, "SELECT id, request FROM job WHERE tenant = ?1 AND key = ?2",
               "tt", s->tenant, key);
    if (st || !k.id[0]) return st;
    if (strcmp(k.hash, s->hash) != 0)
        return error_set(err, ST_CONFLICT, "idempotency_key: it was used for another request, the job '%s'",
                         k.id);
    memcpy(s->id, k.id, sizeof s->id);
    *existing = true;
    return ST_OK;
}

/* --- writing it down --- */

/* A file of the tenant's under a second name: whatever happens to it, the job has it. */
static enum status link_file(const struct submission *s, const char *file_id, const char *name,
                             struct error *err)
{
    struct train_path from = jobs_path(s->jobs, "files/%s", file_id),
                      to = jobs_path(s->jobs, "jobs/%s/%s", s->id, name);
    if (link(from.text, to.text)) return file_error(err, "link", from.text);
    return file_sync_folder_of(to.text, err);
}

static enum status write_folder(const struct submission *s, struct error *err)
{
    const struct train_request *r = s->request;
    struct train_path folder = jobs_path(s->jobs, "jobs/%s", s->id);
    enum status st = file_make_folders(folder.text, err);
    if (!st && r->examples)
        st = file_replace(jobs_path(s->jobs, "jobs/%s/examples.jsonl", s->id).text, r->examples,
                          r->examples_size, err);
    else if (!st)
        st = link_file(s, r->file_id, "examples.jsonl", err);
    if (!st && r->validation_file_id) st = link_file(s, r->validation_file_id, "validation.jsonl", err);
    return st ? st : file_sync_folder_of(folder.text, err);
}

static const char *or_empty(const char *text) { return text ? text : ""; }

static enum status read_serial(void *ctx, sqlite3_stmt *row)
{
    *(int64_t *)ctx = sqlite3_column_int64(row, 0);
    return ST_OK;
}

static enum status insert(const struct submission *s, int64_t *serial, struct error *err)
{
    const struct train_request *r = s->request;
    struct db *db = s->jobs->db;
    enum status st = db_begin(db, err);
    if (st) return st;
    st = db_run(db, err, read_serial, serial,
                "INSERT INTO job (id, tenant, adapter, adapter_number, version, expected_version, settings, "
                "openai, key, request,"
                " file_id, validation_file_id, suffix, metadata, created)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) RETURNING serial",
                "tttitttitttttti", s->id, s->tenant, r->adapter, s->adapter_number, or_empty(r->version),
                r->expected_version, s->settings.data, (int64_t)r->openai, r->idempotency_key, s->hash,
                or_empty(r->file_id), or_empty(r->validation_file_id), or_empty(r->suffix), r->metadata,
                jobs_now());
    return db_end(db, st, err);
}

/* --- the queue --- */

static size_t queued_of(const struct jobs *j, const char *tenant, struct entry ***last)
{
    size_t n = 0;
    for (*last = (struct entry **)&j->first; **last; *last = &(**last)->next)
        n += strcmp((**last)->tenant, tenant) == 0;
    return n;
}

static enum status check_room(const struct submission *s, struct error *err)
{
    struct jobs *j = s->jobs;
    struct entry **last;
    pthread_mutex_lock(&j->lock);
    size_t n = queued_of(j, s->tenant, &last);
    pthread_mutex_unlock(&j->lock);
    if (n < (size_t)j->config.queue_max) return ST_OK;
    return error_set(err, ST_FULL,
                     "%zu training jobs wait or run already: wait for one to end, or cancel one", n);
}

static void enqueue(const struct submission *s, struct entry *e)
{
    struct jobs *j = s->jobs;
    struct entry **last;
    memcpy(e->id, s->id, sizeof e->id);
    snprintf(e->tenant, sizeof e->tenant, "%s", s->tenant);
    atomic_init(&e->stop, false);
    pthread_mutex_lock(&j->lock);
    (void)queued_of(j, s->tenant, &last);
    *last = e;
    pthread_cond_broadcast(&j->work);
    pthread_mutex_unlock(&j->lock);
}

/* Writes a new job down, and queues it. */
static enum status add(struct submission *s, bool *existing, struct error *err)
{
    struct entry *e = calloc(1, sizeof *e);
    if (!e) return jobs_no_memory(err);
    jobs_new_id("ftjob", s->id);
    struct train_path folder = jobs_path(s->jobs, "jobs/%s", s->id);
    enum status st = write_folder(s, err);
    if (!st) st = insert(s, &e->serial, err);
    if (!st) {
        job_event(s->jobs, e->serial, s->id, "info", "message", "queued", NULL);
        enqueue(s, e);
        return ST_OK;
    }
    remove_all(folder.text);
    free(e);
    /* Two calls with one key at once: the other was first. */
    return st == ST_CONFLICT ? find_key(s, existing, err) : st;
}

enum status jobs_submit(struct jobs *j, const char *tenant, const struct train_request *r,
                        char id_out[TRAIN_ID_MAX], bool *existing, struct error *err)
{
    struct submission s = {.jobs = j, .tenant = tenant, .request = r};
    bool known = false;
    enum status st = check_request(&s, err);
    if (!st) {
        train_settings_write(&r->settings, &s.settings);
        if (s.settings.failed) st = jobs_no_memory(err);
    }
    if (!st) {
        hash_request(&s);
        st = find_key(&s, &known, err);
    }
    if (!st && !known) st = check_adapter(&s, err);
    if (!st && !known) st = check_files(&s, err);
    if (!st && !known) st = check_room(&s, err);
    if (!st && !known) st = check_examples(&s, err);
    if (!st && !known) st = add(&s, &known, err);
    strbuf_release(&s.settings);
    if (st) return st;
    memcpy(id_out, s.id, sizeof s.id);
    *existing = known;
    return ST_OK;
}
