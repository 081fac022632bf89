#!lua
-- Queues a dead letter again, as a new job from the beginning: a log never grows behind its terminal event. The letter
-- then bears the new job's id, is listed no more, and goes with the usual retention. Its idempotency key, if it still
-- holds, names the new job. Without flags: at out of memory the server refuses it before it begins.
-- ARGV  1 id  2 id of the new job  3 longest disconnect grace ms  4 most queued  5 most queued of the tenant
--       6 most live of the tenant  7 body and 8 echo of the new job where they are sealed for it, else ''
-- Reply {OK, id of the new job} | {QUEUE_FULL | TENANT_QUEUE_FULL | TENANT_CONCURRENCY}, or nil if it is no dead letter.
-- A repeat is answered with the same new job.
--@include base
--@include jobs
local id, new_id = ARGV[1], ARGV[2]
local now, key, new_key = now_ms(), P .. 'j:' .. ARGV[1], P .. 'j:' .. ARGV[2]
local made = call('HGET', key, 'nx')
if made then return { 'OK', made } end
local j = load(id)
if not j or not call('ZSCORE', P .. 'failed', id) then return false end
local full = refusal(j.t, tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), '')
if full then return { full } end

local kept = call('HMGET', key, 'wt', 'dg', 'b')
local body, echo = kept[3], j.eo
if ARGV[7] and ARGV[7] ~= '' then body, echo = ARGV[7], ARGV[8] end
local digest = ''
local owner = j.ik ~= '' and call('GET', P .. 'i:' .. j.ik)
if owner and string.match(owner, '^%S+') == id then
  digest = j.ik
  call('SET', P .. 'i:' .. digest, new_id .. ' ' .. kept[2])
end
local arrival = call('HINCRBY', KEYS[1], 'seq', 1)
local deadline = now + j.dl - j.cr
call('HSET', new_key, 'st', 'Q', 't', j.t, 'k', j.k, 'c', int(j.c), 'wt', kept[1], 's', int(arrival),
  'gw', '', 'ai', '', 'cr', int(now), 'dl', int(deadline), 'gr', ARGV[3], 'rt', int(j.rt), 'rf', int(j.rf),
  'pt', int(j.pt), 'mx', int(j.mx), 'kv', int(j.kv), 'pk', int(j.pk), 'ik', digest, 'dg', kept[2], 'eo', echo,
  'b', body, 'ep', 0, 'n', 0, 'es', '')
call('ZADD', P .. 'dl', int(deadline), new_id)
call('ZADD', P .. 'dt', int(now + ARGV[3]), new_id) -- nobody listens
call('HINCRBY', P .. 'live', j.t, 1)
queue(load(new_id), arrival)

call('HSET', key, 'nx', new_id, 'ik', '')
call('ZREM', P .. 'failed', id)
call('PEXPIRE', key, int(j.rt))
call('PEXPIRE', key .. ':log', int(j.rt))
return { 'OK', new_id }
