#!lua
-- Queues a job: idempotent by id and by idempotency key, refused at a bound. Without flags: at out of memory the server
-- refuses it before it begins.
-- ARGV  1 id  2 tenant  3 key id  4 class  5 weight  6 gateway  7 time limit ms  8 disconnect grace ms  9 retention ms
--       10 prompt tokens  11 most completion tokens  12 KV slots to begin  13 KV slots at most
--       14 idempotency digest or ''  15 request digest  16 echo  17 body
--       18 most queued  19 most queued of the tenant  20 most live of the tenant  21 gateway lease ms  22 reply TTL ms
--       23 attach id  24 retention ms of a dead letter  25 '1' if replicas are waited for
--       26 '1' if quota was reserved, or ''  27 quota id of a key with caps, or ''  28 most queued of it  29 most live
-- Reply {OK | DUPLICATE, id, state, place, expected wait ms or -1} or {QUEUE_FULL | TENANT_QUEUE_FULL |
-- TENANT_CONCURRENCY | KEY_QUEUE_FULL | KEY_CONCURRENCY | REUSED}
--@include base
--@include jobs
local id, tenant, class, gid = ARGV[1], ARGV[2], tonumber(ARGV[4]), ARGV[6]
set_schema()
local now = now_ms()

local function line(j)
  local position = place(j)
  return position, expected_wait(position)
end

-- A wait for replicas covers what its connection wrote. A repeat, on another one, waits for what was written before it.
if ARGV[25] == '1' then call('HSET', KEYS[1], 'waited', int(now)) end
if call('EXISTS', P .. 'j:' .. id) == 1 then -- our own earlier try, whose reply was lost
  local known = load(id)
  return { 'OK', id, known.st, line(known) }
end
local digest_key = P .. 'i:' .. ARGV[14]
if ARGV[14] ~= '' then
  local other = call('GET', digest_key)
  if other then
    local other_id, digest = string.match(other, '^(%S+) (.*)$')
    local j = load(other_id)
    if j and digest ~= ARGV[15] then return { 'REUSED' } end
    if j then return { 'DUPLICATE', other_id, j.st, line(j) } end
  end
end
local full = refusal(tenant, tonumber(ARGV[18]), tonumber(ARGV[19]), tonumber(ARGV[20]), ARGV[27], tonumber(ARGV[28]),
  tonumber(ARGV[29]))
if full then return { full } end

local arrival = call('HINCRBY', KEYS[1], 'seq', 1)
local deadline = now + ARGV[7]
call('HSET', P .. 'j:' .. id, 'st', 'Q', 't', tenant, 'k', ARGV[3], 'c', class, 'wt', ARGV[5], 's', arrival,
  'gw', gid, 'ai', ARGV[23], 'cr', int(now), 'dl', int(deadline), 'gr', ARGV[8], 'rt', ARGV[9], 'rf', ARGV[24], 'pt', ARGV[10],
  'mx', ARGV[11], 'kv', ARGV[12], 'pk', ARGV[13], 'ik', ARGV[14], 'dg', ARGV[15], 'eo', ARGV[16], 'b', ARGV[17], 'ep', 0, 'n', 0, 'es', '',
  'rq', ARGV[26], 'kc', ARGV[27])
if ARGV[14] ~= '' then call('SET', digest_key, id .. ' ' .. ARGV[15]) end
renew_gateway(gid, tonumber(ARGV[21]), tonumber(ARGV[22]), now)
call('SADD', P .. 'g:' .. gid, id)
call('ZADD', P .. 'dl', int(deadline), id)
call('HINCRBY', P .. 'live', tenant, 1)
local j = { id = id, st = 'Q', t = tenant, c = class, at = 0, kc = ARGV[27] } -- to read all of it back takes as long as this script
count_of_key('kl', j, 1)
queue(j, arrival)
return { 'OK', id, 'Q', line(j) }
