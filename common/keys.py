"""Every Redis key: type, who writes it, when it dies; and the ids that are part of keys.

One *shard* belongs to one model revision and is one hash tag, so that a script works in a single cluster slot. `<id>`
is a generation id, `<wid>` a worker incarnation, `<gid>` a gateway incarnation, both random at each start.

    {<shard>}:meta            hash    all      fields of the shard, see below         never
    {<shard>}:j:<id>          hash    all      one job, see scripts/lib_jobs.lua      retention after its end (*)
    {<shard>}:j:<id>:log      stream  all      `<epoch>-<event number>`, the truth    retention after its end (*)
    {<shard>}:q:<c>:<tenant>  zset    all      queued ids of a tenant and class, by arrival            when empty
    {<shard>}:alone:<c>       zset    all      queued ids that may only run alone, by arrival          when empty
    {<shard>}:act:<c>         zset    all      tenants with queued jobs, by service so far             when empty
    {<shard>}:vtc             zset    all      service counter of each tenant         below the floor, or an hour
    {<shard>}:credit          hash    all      service charged to a tenant and not used, for its next jobs   as vtc
    {<shard>}:len             hash    all      queued jobs of each class              never (3 fields)
    {<shard>}:live            hash    all      queued + running jobs of each tenant   field at zero
    {<shard>}:kl, kq          hash    all      live, and queued, jobs of each quota id with a cap   field at zero
    {<shard>}:settle          zset    all      ended jobs whose quota is to be settled, by end   once settled
    {<shard>}:bell            list    all      wake-ups for idle workers, at most 8   when the queue empties
    {<shard>}:dl              zset    all      live ids by deadline (ms)              member at the job's end
    {<shard>}:dt              zset    all      detached ids by end of grace (ms)      member at the job's end
    {<shard>}:wl              zset    worker   workers by end of lease (ms)           member at leave or reap
    {<shard>}:w:<wid>         hash    worker   running ids -> run record, see scripts/lib_jobs.lua     leave or reap
    {<shard>}:wc:<wid>        string  worker   last claim call, the ids it handed out     2 minutes
    {<shard>}:wi:<wid>        string  worker   WorkerInfo (msgpack)                   3 leases
    {<shard>}:wi:<wid>:at     string  worker   time of its last heartbeat, ms         3 leases
    {<shard>}:wi:<wid>:drain  string  gateway  who asked it to drain                  a day, or when it leaves
    {<shard>}:gl              zset    gateway  gateways by end of lease (ms)          member at sweep
    {<shard>}:g:<gid>         set     gateway  live ids whose events go to this gateway     empty at sweep
    {<shard>}:gw:<gid>        stream  all      reply stream; about 1,000 entries      its TTL, renewed each second
    {<shard>}:i:<digest>      string  gateway  idempotency key -> id, request digest  retention after the job's end
    {<shard>}:usage:<hour>    hash    all      tokens by kind, API key and tenant     35 days
    {<shard>}:failed          zset    all      dead letters by their end (ms)         never (1,000 at most)
    {<shard>}:dead            list    0.1      failed ids, by programs of version 0.1         never (1,000 at most)

    {models}:cards            hash    worker   shard -> ModelCard (msgpack)           until deleted
    {models}:times            hash    worker   shard -> server time of publication, ms    until deleted
    {models}:files            hash    worker   shard -> SHA-256 of its files, for clean-up    until deleted
    {models}:version          string  worker   counts changes of the registry         never
    {models}:log-levels       hash    admin    module -> "<level> <until, ms>"            until another one is set
    {models}:b:<sha256>       string  worker   tokenizer files by content             with the last card that names it

    {keys}:k:<key id>         hash    admin    tenant, name, times, and the key's SHA-256, never the key   never
    {keys}:ids                set     admin    all key ids                            never
    {keys}:secret             string  admin    random bytes that all gateways share   never
    {keys}:first              string  admin    id of the first administrator's key    never
    {keys}:tenants            hash    admin    tenant -> its policy (JSON)            until deleted

    {t:<tenant>}:quota        hash    gateway  rates, see scripts/quota_reserve.lua   2 minutes
    {t:<tenant>}:d:<day>      hash    gateway  tokens of a UTC day, of the tenant and each quota id        2 days
    {t:<tenant>}:r:<id>       string  gateway  what a generation has reserved         once settled, or a lifetime

    {t:<tenant>}:b:<bid>          hash    gateway  one batch, see scripts/lib_batches.lua      retention after its end
    {t:<tenant>}:b:<bid>:items    list    gateway  its requests                          its end; 10 minutes while made
    {t:<tenant>}:b:<bid>:results  list    gateway  what came of them, in that order            retention after its end
    {t:<tenant>}:b:<bid>:done     string  gateway  a bit for each item with a result                       its end
    {t:<tenant>}:bi:<digest>      string  gateway  idempotency key -> batch, request digest            with the batch
    {t:<tenant>}:batches          zset    gateway  a tenant's batches by creation         with the last one, or trimmed
    {batches}:active              zset    gateway  batches that run, by when somebody is to look at them      when empty

(*) A failed job: the retention of dead letters if that is longer, or until it is purged or the oldest of too many. Once
it has been sent again: the usual retention from then.

Fields of {<shard>}:meta; times are the server's, in ms:

    schema                 version of keys, fields and scripts
    seq                    jobs that have arrived
    floor                  highest service counter at which a tenant's job was handed out: idling earns no credit
    floor:<c>              where a class has come to, by service counter: newcomers begin there       when it empties
    share:<c>              service that a class below the highest may claim before the others         when it empties
    gap                    ms between two jobs handed out while others waited, an average over the last ones
    handed                 when the last job was handed out, if others have waited ever since
    reaped, swept          time of the last reap and of the last sweep
    grace, sweep_grace     until when ended leases of workers, and of gateways, do not count
    alone                  "<worker> <until> <id or ->": the worker that is reserved for jobs to run alone
    waited                 time of the last job that replicas must confirm: there is always something to wait for
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from typing import Final

from common.errors import BatchNotFound, GenerationNotFound

SCHEMA_VERSION: Final = 1  # of keys, fields and scripts together; written into {shard}:meta

MODEL_CARDS: Final = "{models}:cards"
MODEL_TIMES: Final = "{models}:times"
LOG_LEVELS: Final = "{models}:log-levels"
MODEL_VERSION: Final = "{models}:version"
API_KEY_IDS: Final = "{keys}:ids"
SHARED_SECRET: Final = "{keys}:secret"
FIRST_ADMIN_KEY: Final = "{keys}:first"
TENANTS: Final = "{keys}:tenants"
ACTIVE_BATCHES: Final = "{batches}:active"

PRIORITY_CLASSES: Final = 3  # 0 is served first

_SHARD: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_RESERVED_TAGS: Final = frozenset({"models", "keys", "batches"})
_LETTER_OF_BYTE: Final = b"abcdefghijklmnopqrstuvwxyz234567" * 8
_RANDOM_ID: Final = re.compile(r"[a-z2-7]{26}")
_BATCH_ID: Final = re.compile(r"batch-[a-z2-7]{26}")
_MAX_SLUG: Final = 40


def random_id() -> str:
    """130 random bits as 26 lower-case base32 characters; the scripts rely on this length for gateway ids."""
    return secrets.token_bytes(26).translate(_LETTER_OF_BYTE).decode()


def shard_name(model_name: str, revision: str) -> str:
    """The shard of a model revision: readable, safe inside a hash tag, and distinct for every (name, revision)."""
    slug = re.sub(r"[^a-z0-9]+", "-", model_name.lower()).strip("-")[:_MAX_SLUG].strip("-") or "model"
    digest = hashlib.sha256(f"{len(model_name)}:{model_name}{revision}".encode()).hexdigest()[:16]
    return f"{slug}-{digest}"


def check_shard(shard: str) -> str:
    """Return `shard`, or raise ValueError where it could leave its hash tag."""
    if not _SHARD.fullmatch(shard) or shard in _RESERVED_TAGS:
        raise ValueError("a shard is 1 to 63 characters of a-z, 0-9 and '-', not beginning with '-'")
    return shard


def check_incarnation(incarnation: str) -> str:
    """Return a gateway's or worker's id, or raise ValueError where it does not come from `random_id`."""
    if not _RANDOM_ID.fullmatch(incarnation):
        raise ValueError("a gateway or worker id is 26 characters of lower-case base32")
    return incarnation


def new_generation_id(shard: str) -> str:
    """A fresh generation id; opaque to callers, but it begins with its shard."""
    return f"{check_shard(shard)}.{random_id()}"


def shard_of(generation_id: str) -> str:
    """The shard of a generation id.

    Raises GenerationNotFound for anything that we cannot have issued, so that a made-up id is answered like an unknown
    one.
    """
    shard, dot, rest = generation_id.partition(".")
    if not dot or not _SHARD.fullmatch(shard) or not _RANDOM_ID.fullmatch(rest):
        raise GenerationNotFound
    return shard


def meta(shard: str) -> str:
    """The key that every script names: real, and of the right hash tag (an ACL refuses a bare prefix)."""
    return f"{{{shard}}}:meta"


def job(shard: str, generation_id: str) -> str:
    return f"{{{shard}}}:j:{generation_id}"


def job_log(shard: str, generation_id: str) -> str:
    return f"{{{shard}}}:j:{generation_id}:log"


def service_counters(shard: str) -> str:
    return f"{{{shard}}}:vtc"


def queue_lengths(shard: str) -> str:
    return f"{{{shard}}}:len"


def bell(shard: str) -> str:
    return f"{{{shard}}}:bell"


def deadlines(shard: str) -> str:
    return f"{{{shard}}}:dl"


def detached(shard: str) -> str:
    return f"{{{shard}}}:dt"


def worker_leases(shard: str) -> str:
    return f"{{{shard}}}:wl"


def worker_jobs(shard: str, worker_id: str) -> str:
    return f"{{{shard}}}:w:{worker_id}"


def gateway_leases(shard: str) -> str:
    return f"{{{shard}}}:gl"


def gateway_jobs(shard: str, gateway_id: str) -> str:
    return f"{{{shard}}}:g:{gateway_id}"


def reply_stream(shard: str, gateway_id: str) -> str:
    return f"{{{shard}}}:gw:{gateway_id}"


def idempotency_digest(tenant: str, key: str) -> str:
    """Name of an idempotency key. Hashed with the tenant's length, so that no two (tenant, key) pairs share a name."""
    raw = hashlib.sha256(f"{len(tenant)}:{tenant}{key}".encode()).digest()[:16]
    return base64.b32encode(raw).decode().rstrip("=").lower()


def idempotency(shard: str, digest: str) -> str:
    return f"{{{shard}}}:i:{digest}"


def usage(shard: str, hour: int) -> str:
    """Usage of one hour; `hour` is server time in hours since the epoch."""
    return f"{{{shard}}}:usage:{hour}"


def settlements(shard: str) -> str:
    return f"{{{shard}}}:settle"


def quota(tenant: str) -> str:
    return f"{{t:{tenant}}}:quota"


def dead_letters(shard: str) -> str:
    return f"{{{shard}}}:failed"


def new_batch_id() -> str:
    """A fresh batch id; the scripts rely on its length."""
    return f"batch-{random_id()}"


def batch(tenant: str, batch_id: str) -> str:
    """Raises BatchNotFound for an id that we cannot have issued."""
    if not _BATCH_ID.fullmatch(batch_id):
        raise BatchNotFound
    return f"{{t:{tenant}}}:b:{batch_id}"


def batches(tenant: str) -> str:
    return f"{{t:{tenant}}}:batches"


def batch_idempotency(tenant: str, digest: str) -> str:
    return f"{{t:{tenant}}}:bi:{digest}"


def model_blob(sha256: str) -> str:
    return f"{{models}}:b:{sha256}"


def api_key(key_id: str) -> str:
    return f"{{keys}}:k:{key_id}"
