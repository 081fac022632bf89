-- Jobs: what is stored, and every change of state that more than one script makes.
--
-- {s}:j:<id>, hash. Set at enqueue:
--   t tenant, k API key id, c class, wt weight, s arrival, cr created, dl deadline (ms), gr disconnect grace (ms),
--   rt retention (ms), rf retention of a dead letter (ms), pt prompt tokens, mx most completion tokens,
--   rq '1' if quota was reserved, kc quota id by which caps count it, or '',
--   kv / pk KV slots to begin / at most, ik idempotency digest, dg request digest, eo the gateway's record, b body
-- Changed later:
--   st state Q R D F C E, y reason, ft first token (ms), ep epoch, n events,
--   es "<epoch>:<events before it>," of each epoch that wrote to the log, at fruitless attempts in a row, nc claims,
--   w worker, gw gateway or '', ai attach id (the call that has the stream), sc first claim, en end,
--   ch tokens charged at the first claim, ct / cp completion / cached prompt tokens, lb log bytes,
--   nx the generation that a retry of this dead letter made, pe times preempted,
--   fl '1' once it was handed out by its class's share, while a higher class waited: it is preempted no more
--
-- {s}:w:<wid>, hash: id -> run record. While a job runs, n, ct, cp and lb live here and not in the job's hash, so that a
-- commit reads and writes one key for all its jobs (half the server's time per token of a hash per job). The record is
--   id 20: last entry of this epoch in the log, "<epoch>-<n>"; counters 40: "ct cp lb progress"; gateway 26
-- each padded with spaces; a gateway of dashes is none. More than 64 bytes, so that the server keeps a hash table: with
-- its compact encoding, a lookup is a scan over all fields.
local NO_GATEWAY = string.rep('-', 26)
local EMPTY_HASH = string.rep('\0', 8)
local AHEAD = 1e12 -- a requeued job is before all that never ran, in its old order
local MAX_ATTEMPTS_IN_COMPANY = 2 -- a job that took as many workers with it in a row is handed out alone
local MAX_REPLY_ENTRIES = 1000
local MAX_REPLY_ITEM_BYTES = 4096
local MAX_DEAD_LETTERS = 1000
local MAX_SETTLEMENTS = 100000 -- that wait for a gateway: more only where there is none
local USAGE_TTL_S = 35 * 86400
local IDLE_TENANT_TTL_S = 3600
local AHEAD_OF_TIES = 0.001
local INPUT_COST, OUTPUT_COST = 1, 2 -- service in token units (VTC, arXiv:2401.00588)
local FIELDS = {
  'st', 't', 'k', 'y', 'w', 'gw', 'ik', 'es', 'eo', 'ai', 'rq', 'kc',
  'c', 'wt', 's', 'cr', 'dl', 'gr', 'rt', 'rf', 'pt', 'mx', 'kv', 'pk',
  'ep', 'n', 'at', 'nc', 'sc', 'en', 'ch', 'ct', 'cp', 'lb', 'ft', 'pe', 'fl',
}
local NUM_TEXT_FIELDS = 12

local function fill(text, width)
  return text .. string.rep(' ', width - #text)
end

local function run_record(j)
  local counters = int(j.ct) .. ' ' .. int(j.cp) .. ' ' .. int(j.lb) .. ' ' .. j.progress
  return fill(int(j.ep) .. '-' .. int(j.n), 20) .. fill(counters, 40) .. (j.gw ~= '' and j.gw or NO_GATEWAY)
end

local function read_counters(j, text)
  local ct, cp, lb, progress = string.match(text, '^(%d+) (%d+) (%d+) (%d)')
  j.ct, j.cp, j.lb, j.progress = tonumber(ct), tonumber(cp), tonumber(lb), tonumber(progress)
end

-- A job as a table with the fields above (and progress: whether its current epoch committed any), or nil.
local function load(id)
  local values = call('HMGET', P .. 'j:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local j = { id = id, progress = 0 }
  for i, name in ipairs(FIELDS) do
    if i <= NUM_TEXT_FIELDS then j[name] = values[i] or '' else j[name] = tonumber(values[i] or 0) end
  end
  if j.st == 'R' then
    local record = call('HGET', P .. 'w:' .. j.w, id)
    if record then
      j.n = tonumber(string.match(record, '^%d+%-(%d+)'))
      read_counters(j, string.sub(record, 21, 60))
    end
  end
  return j
end

-- Whether there is such a job of this tenant. A foreign id and an absent one take the same work, so that no clock tells
-- them apart.
local function is_of(id, tenant)
  return call('HGET', P .. 'j:' .. id, 't') == tenant -- mutant: tenant
end

local function is_live(j)
  return j.st == 'Q' or j.st == 'R'
end

-- An entry's field e is four msgpack values: chain hash (bin of 8), epoch, event number, EventBody or nil.
local function entry(hash, ep, n, body)
  return '\196\8' .. hash .. cmsgpack.pack(ep) .. cmsgpack.pack(n) .. (body or '\192')
end

local function hash_of(e)
  return string.sub(e, 3, 10)
end

local function last_hash(id)
  local last = call('XREVRANGE', P .. 'j:' .. id .. ':log', '+', '-', 'COUNT', 1)[1]
  return last and hash_of(last[2][2]) or EMPTY_HASH
end

-- Reply items are msgpack arrays [id, hash, epoch, n, body, kind, reason], each entry of the stream an array of them.
-- An item too large for the stream is sent as [id, hash, epoch, n] and a copy of its body stays in the log only.
local function text(s)
  return '\217' .. string.char(#s) .. s
end

local function array_head(n)
  return '\220' .. string.char(math.floor(n / 256), n % 256)
end

local function send(gw, packed)
  call('XADD', P .. 'gw:' .. gw, 'NOMKSTREAM', 'MAXLEN', '~', MAX_REPLY_ENTRIES, '*', 'b', packed)
end

local function notify(gw, id, e, kind, reason)
  if gw ~= '' then send(gw, array_head(1) .. '\151' .. text(id) .. e .. text(kind) .. text(reason or '')) end
end

-- Bell: a token per wake-up, never more than MAX_BELL; an idle worker pops one.
local function ring()
  if call('LLEN', P .. 'bell') < MAX_BELL then call('LPUSH', P .. 'bell', '1') end -- mutant: bell
end

local known_lengths -- as they are, once asked for; written by count_queued only
local function queue_lengths()
  if not known_lengths then
    known_lengths = call('HMGET', P .. 'len', 0, 1, 2)
    for i = 1, CLASSES do known_lengths[i] = tonumber(known_lengths[i] or 0) end
  end
  return known_lengths
end

local function count_queued(class, change)
  local left = call('HINCRBY', P .. 'len', class, change)
  if known_lengths then known_lengths[class + 1] = left end
  return left
end

local function num_queued()
  local total = 0
  for _, n in ipairs(queue_lengths()) do total = total + n end
  return total
end

-- Service counters (VTC, arXiv:2401.00588), in token units over the weight; the tenant with the least is served first. One
-- that becomes active begins where its class has come to, {s}:meta floor:<class>: idling earns no credit. That is the
-- counter at which the last job was handed out (start-time fair queueing), not the least of those who wait: their next
-- turn comes after that of a newcomer, who so waits for one slot. Once a newcomer has had its turn, later ones begin
-- behind the next tenant in line: any number of them keeps nobody from his turn.
--
-- A tenant's counter, which is `known` to those who have asked before, and the classes in which it has jobs waiting: nil
-- where there are none.
local function counter_of(tenant, known)
  local counter, active = known or call('ZSCORE', P .. 'vtc', tenant), nil
  for c = 0, CLASSES - 1 do
    local score = queue_lengths()[c + 1] > 0 and call('ZSCORE', P .. 'act:' .. c, tenant)
    if score then
      active, counter = active or {}, counter or score -- counters expire, but queued jobs may wait for a worker for longer
      active[#active + 1] = c
    end
  end
  return tonumber(counter or 0), active
end

local function start_level(class)
  local reached = call('HGET', KEYS[1], 'floor:' .. class)
  if reached then return reached - AHEAD_OF_TIES end -- credit may cover a whole charge: then the turns do not move
  local least = call('ZRANGE', P .. 'act:' .. class, 0, 0, 'WITHSCORES')[2]
  return tonumber(least or call('HGET', KEYS[1], 'floor') or 0)
end

local function activate(tenant, class)
  local counter, active = counter_of(tenant)
  if not active then
    local credit = call('HGET', P .. 'credit', tenant)
    if credit then
      counter = counter - credit
      call('HDEL', P .. 'credit', tenant)
    end
    counter = math.max(counter, start_level(class)) -- mutant: lift
  end
  call('ZADD', P .. 'vtc', counter, tenant)
  call('ZADD', P .. 'act:' .. class, counter, tenant)
end

-- The counter of a tenant with queued jobs never falls: what its jobs used less than they were charged is credited to its
-- next ones. With a counter that fell at every end of a job, it would pass a newcomer again and again.
local function charge(tenant, amount, known)
  local counter, active = counter_of(tenant, known)
  local stored = call('HGET', P .. 'credit', tenant)
  local credit = tonumber(stored or 0)
  if active and amount < 0 then
    credit, amount = credit - amount, 0
  elseif credit > 0 and amount > 0 then
    local used = math.min(credit, amount)
    credit, amount = credit - used, amount - used
  end
  if credit > 0 then
    call('HSET', P .. 'credit', tenant, string.format('%.17g', credit))
    call('EXPIRE', P .. 'credit', IDLE_TENANT_TTL_S)
  elseif stored then
    call('HDEL', P .. 'credit', tenant)
  end
  local charged = counter + amount
  call('ZADD', P .. 'vtc', charged, tenant)
  for _, c in ipairs(active or {}) do call('ZADD', P .. 'act:' .. c, charged, tenant) end
  call('EXPIRE', P .. 'vtc', IDLE_TENANT_TTL_S)
end

-- A class has come to where its last job was handed out, or behind the next turn where that was a newcomer's; see above.
local function move_floor(class, counter)
  local key = 'floor:' .. class
  local marks = call('HMGET', KEYS[1], 'floor', key)
  local reached = tonumber(marks[2] or -math.huge)
  if counter > reached then
    reached = counter
  elseif math.abs(reached - counter - AHEAD_OF_TIES) < AHEAD_OF_TIES / 2 then
    local next_turn = call('ZRANGEBYSCORE', P .. 'act:' .. class, marks[2], '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
    reached = next_turn and next_turn + 2 * AHEAD_OF_TIES or reached -- 2: the tenant whose turn it is is no newcomer
  end
  local floor = math.max(counter, tonumber(marks[1] or 0))
  call('HSET', KEYS[1], key, string.format('%.17g', reached), 'floor', string.format('%.17g', floor))
end

-- Jobs of a credential that has caps in number are counted by its quota id.
local function count_of_key(hash, j, change)
  if (j.kc or '') ~= '' and call('HINCRBY', P .. hash, j.kc, change) <= 0 then call('HDEL', P .. hash, j.kc) end
end

-- The queue: a zset per class and tenant, the tenants of a class by counter, the lengths per class. Beside it, a zset per
-- class of the jobs that may only run alone, which claim hands out one after another.
local function queue(j, score)
  if j.at >= MAX_ATTEMPTS_IN_COMPANY then -- mutant: isolation
    call('ZADD', P .. 'alone:' .. j.c, score, j.id)
  else
    call('ZADD', P .. 'q:' .. j.c .. ':' .. j.t, score, j.id)
    activate(j.t, j.c)
  end
  count_queued(j.c, 1)
  count_of_key('kq', j, 1)
  ring()
end

-- Why a tenant's new job is not accepted now, or nil. `kc` is the quota id of a credential with caps of its own, or ''.
local function refusal(tenant, max_queued, max_queued_of_tenant, max_live_of_tenant, kc, max_queued_of_key, max_live_of_key)
  if num_queued() >= max_queued then return 'QUEUE_FULL' end
  local queued = 0
  for c = 0, CLASSES - 1 do
    if queue_lengths()[c + 1] > 0 then queued = queued + call('ZCARD', P .. 'q:' .. c .. ':' .. tenant) end
  end
  if queued >= max_queued_of_tenant then return 'TENANT_QUEUE_FULL' end
  if tonumber(call('HGET', P .. 'live', tenant) or 0) >= max_live_of_tenant then return 'TENANT_CONCURRENCY' end
  if kc == '' then return end
  -- Programs of version 0.1 that run beside ours do not count these: an idle tenant's begin anew.
  if call('HEXISTS', P .. 'live', tenant) == 0 then
    call('HDEL', P .. 'kl', kc)
    call('HDEL', P .. 'kq', kc)
  end
  if tonumber(call('HGET', P .. 'kq', kc) or 0) >= max_queued_of_key then return 'KEY_QUEUE_FULL' end
  if tonumber(call('HGET', P .. 'kl', kc) or 0) >= max_live_of_key then return 'KEY_CONCURRENCY' end
end

local function unqueue(j)
  local q = P .. 'q:' .. j.c .. ':' .. j.t
  if call('ZREM', q, j.id) == 0 and call('ZREM', P .. 'alone:' .. j.c, j.id) == 0 then return end
  local left = count_queued(j.c, -1)
  count_of_key('kq', j, -1)
  if call('EXISTS', q) == 0 then call('ZREM', P .. 'act:' .. j.c, j.t) end
  if left > 0 then return end
  local over = { 'share:' .. j.c, 'floor:' .. j.c } -- an empty class saves nothing up
  if num_queued() == 0 then
    call('DEL', P .. 'bell')
    over[3] = 'handed'
  end
  call('HDEL', KEYS[1], unpack(over))
end

-- About how many jobs are served before this one, plus one: higher classes, and its tenant's turns in its own class.
local function place(j)
  if j.st ~= 'Q' then return 0 end
  local lengths, ahead = queue_lengths(), 0
  for c = 0, j.c - 1 do ahead = ahead + lengths[c + 1] end
  local own = math.max(0, lengths[j.c + 1] - 1)
  if own == 0 then return ahead + 1 end -- it is the only one of its class
  local rank = call('ZRANK', P .. 'q:' .. j.c .. ':' .. j.t, j.id) or 0
  return ahead + math.min(own, rank * math.max(1, call('ZCARD', P .. 'act:' .. j.c))) + 1
end

-- About how many ms a job waits at this place, -1 if it does not wait or that is not known: no worker is alive, or none
-- has taken a job while others waited.
local function expected_wait(position)
  local gap = position > 0 and call('HGET', KEYS[1], 'gap')
  if not gap then return -1 end
  local latest_lease = call('ZREVRANGE', P .. 'wl', 0, 0, 'WITHSCORES')[2]
  if tonumber(latest_lease or 0) < now_ms() then return -1 end
  return math.ceil(position * gap)
end

-- Takes the job off its worker; a worker that still computes it learns it from its next commit.
local function take_from_worker(j)
  call('HDEL', P .. 'w:' .. j.w, j.id) -- mutant: ownership
end

-- Prompt tokens are charged only to a job that started.
local function prompt_tokens(j)
  return j.sc > 0 and j.pt or 0
end

local function add_usage(j, now)
  local key = P .. 'usage:' .. int(math.floor(now / 3600000))
  local owner = ':' .. j.k .. ':' .. j.t
  call('HINCRBY', key, 'generations' .. owner, 1)
  local tokens = { prompt_tokens = prompt_tokens(j), cached_prompt_tokens = j.cp, completion_tokens = j.ct }
  for kind, amount in pairs(tokens) do
    if amount > 0 then call('HINCRBY', key, kind .. owner, int(amount)) end
  end
  call('EXPIRE', key, USAGE_TTL_S)
end

-- Word of what an ended job used of its reservation, for a gateway to settle under the tenant's own hash tag.
local function owe(j, now)
  local key = P .. 'settle'
  call('ZADD', key, int(now), j.id .. ' ' .. int(prompt_tokens(j) + j.ct) .. ' ' .. j.t)
  if call('ZCARD', key) > MAX_SETTLEMENTS then call('ZREM', key, call('ZRANGE', key, 0, 0)[1]) end
end

-- Deletes all that is stored of a final job.
local function erase(id)
  local digest = call('HGET', P .. 'j:' .. id, 'ik')
  local key = digest and digest ~= '' and P .. 'i:' .. digest
  local owner = key and call('GET', key)
  if owner and string.match(owner, '^%S+') == id then call('DEL', key) end
  call('DEL', P .. 'j:' .. id, P .. 'j:' .. id .. ':log')
end

-- A failed job is a dead letter, kept for a time of its own: it can be looked at, and sent again, after its caller has
-- gone. Bounded in number: the oldest go with all their data.
local function bury(j, now)
  local letters = P .. 'failed'
  call('ZADD', letters, int(now), j.id)
  while call('ZCARD', letters) > MAX_DEAD_LETTERS do
    local oldest = call('ZRANGE', letters, 0, 0)[1]
    erase(oldest)
    call('ZREM', letters, oldest)
  end
end

-- The one way to a final state, after its terminal event stands in the log: counts usage once, settles the tenant's
-- service, takes the job out of every index, and starts the time that its result is kept.
local function settle(j, state, reason, now)
  local key = P .. 'j:' .. j.id
  call('HSET', key, 'st', state, 'y', reason, 'ep', int(j.ep), 'n', int(j.n), 'ct', int(j.ct), 'cp', int(j.cp),
    'lb', int(j.lb), 'en', int(now), 'es', j.es, 'w', '')
  call('ZREM', P .. 'dl', j.id)
  call('ZREM', P .. 'dt', j.id)
  if j.gw ~= '' then call('SREM', P .. 'g:' .. j.gw, j.id) end
  count_of_key('kl', j, -1)
  if call('HINCRBY', P .. 'live', j.t, -1) <= 0 then
    call('HDEL', P .. 'live', j.t)
  end
  if j.rq ~= '' then owe(j, now) end
  if j.sc > 0 then charge(j.t, (INPUT_COST * j.pt + OUTPUT_COST * j.ct - j.ch) / j.wt) end
  add_usage(j, now)
  -- Of a dead letter, what sending it again needs is kept for longer: its hash. A log may be a thousand times as large.
  call('PEXPIRE', key, int(state == 'F' and j.rf > 0 and j.rf or j.rt))
  call('PEXPIRE', key .. ':log', int(j.rt))
  if j.ik ~= '' then call('PEXPIRE', P .. 'i:' .. j.ik, int(j.rt)) end
  if state == 'F' then bury(j, now) end
  j.st = state
end

-- Ends a live job from outside: cancel (C), expire (E), give up (F). The higher epoch fences off whoever computes it.
local function finish(j, state, reason, now)
  if j.st == 'Q' then unqueue(j) else take_from_worker(j) end
  local hash = last_hash(j.id)
  j.es = j.es .. int(j.ep + 1) .. ':' .. int(j.n) .. ','
  j.ep = j.ep + 1
  j.n = j.n + 1
  local body = '\146\144\147' .. cmsgpack.pack(prompt_tokens(j)) .. cmsgpack.pack(j.cp) .. cmsgpack.pack(j.ct)
  local e = entry(hash, j.ep, j.n, body)
  call('XADD', P .. 'j:' .. j.id .. ':log', int(j.ep) .. '-' .. int(j.n), 'e', e, 'k', state, 'y', reason)
  notify(j.gw, j.id, e, state, reason)
  settle(j, state, reason, now)
end

local function cancel(j, reason, now)
  finish(j, 'C', reason, now)
end

local function expire(j, now)
  finish(j, 'E', j.sc > 0 and 'TIME_LIMIT' or 'NEVER_STARTED', now)
end

-- Puts a running job back at the head of its queue, or gives it up: after max_attempts epochs in a row without progress,
-- or max_claims claims. Otherwise one poisonous job would take worker after worker with it.
local function requeue(j, counts, max_attempts, max_claims, now)
  if j.progress == 1 then j.at = 0 elseif counts then j.at = j.at + 1 end
  if j.at >= max_attempts or j.nc >= max_claims then
    call('HSET', P .. 'j:' .. j.id, 'at', int(j.at))
    finish(j, 'F', 'ATTEMPTS_EXHAUSTED', now)
    return false
  end
  take_from_worker(j)
  j.ep = j.ep + 1
  j.st = 'Q'
  call('HSET', P .. 'j:' .. j.id, 'st', 'Q', 'ep', int(j.ep), 'n', int(j.n), 'ct', int(j.ct), 'cp', int(j.cp),
    'lb', int(j.lb), 'at', int(j.at), 'w', '')
  call('ZADD', P .. 'dl', int(j.dl), j.id)
  queue(j, int(j.s - AHEAD))
  notify(j.gw, j.id, entry(last_hash(j.id), j.ep, j.n), 'Q')
  return true
end

-- Nobody listens any more: the job's own grace begins, or `least_grace` if that is longer, or it ends at once.
local function detach(j, now, least_grace)
  local grace = math.max(j.gr, least_grace or 0)
  if j.gw ~= '' then call('SREM', P .. 'g:' .. j.gw, j.id) end
  if grace <= 0 then
    j.gw = ''
    call('HSET', P .. 'j:' .. j.id, 'gw', '')
    cancel(j, 'DISCONNECTED', now)
    return
  end
  call('ZADD', P .. 'dt', int(now + grace), j.id)
  j.gw = ''
  call('HSET', P .. 'j:' .. j.id, 'gw', '')
  if j.st == 'R' then call('HSET', P .. 'w:' .. j.w, j.id, run_record(j)) end
end

-- The gateway's lease and stream. The stream's first entry is an empty array: XADD by others does not create a stream, so
-- that a dead gateway's stream stays dead.
local function renew_gateway(gid, lease_ms, reply_ttl_ms, now)
  local is_new = call('ZADD', P .. 'gl', lease_ms > 0 and int(now + lease_ms) or 0, gid)
  local stream = P .. 'gw:' .. gid
  if call('PEXPIRE', stream, int(reply_ttl_ms)) == 0 then
    call('XADD', stream, '*', 'b', array_head(0))
    call('PEXPIRE', stream, int(reply_ttl_ms))
  end
  return is_new
end

-- Why a worker does not hold a job any more (LostReason).
local function why_lost(id)
  local state = call('HGET', P .. 'j:' .. id, 'st')
  if not state then return 'gone' end
  return ({ C = 'cancelled', E = 'expired', Q = 'taken', R = 'taken' })[state] or 'ended'
end

-- A job as the library reads it (GenerationRecord), in this order.
local function describe(j)
  local position = place(j)
  return {
    j.id, j.st, j.y, j.t, j.k, j.c, j.ep, j.at, j.nc, j.n, prompt_tokens(j), j.cp, j.ct, position, j.w, j.gw,
    j.cr, j.sc, j.ft, j.en, j.dl, j.gr, j.eo, expected_wait(position),
  }
end
