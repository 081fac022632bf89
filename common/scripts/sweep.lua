#!lua flags=allow-oom
-- Ends what nobody else ends: jobs past their deadline (a queued one even with no worker alive), detached jobs past their
-- grace; and begins the grace of a dead gateway's jobs. Forgets idle tenants whose service counter means nothing any more:
-- a tenant that comes back is lifted to the floor in any case. Every gateway and idle worker runs it each second.
-- ARGV  1 most jobs of each kind  2 most gateways  3 gateway lease ms
-- Reply {expired ids, cancelled ids, detached ids}
--@include base
--@include jobs
local now, most, lease = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[3])
local expired, cancelled, detached = {}, {}, {}
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'dl', '-inf', int(now), 'LIMIT', 0, most)) do
  local j = load(id)
  if j and is_live(j) then
    expire(j, now)
    expired[#expired + 1] = id
  else
    call('ZREM', P .. 'dl', id)
  end
end
local ended = ended_by('swept', 'sweep_grace', now, lease)
shorten_leases(P .. 'gl', now, lease, ARGV[2])
for _, gid in ipairs(call('ZRANGEBYSCORE', P .. 'gl', '-inf', int(ended), 'LIMIT', 0, ARGV[2])) do -- mutant: grace
  for _, id in ipairs(call('SRANDMEMBER', P .. 'g:' .. gid, most)) do
    local j = load(id)
    if j and is_live(j) and j.gw == gid then
      detach(j, now)
      detached[#detached + 1] = id
    else
      call('SREM', P .. 'g:' .. gid, id)
    end
  end
  if call('EXISTS', P .. 'g:' .. gid) == 0 then
    call('ZREM', P .. 'gl', gid)
    call('DEL', P .. 'gw:' .. gid)
  end
end
for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'dt', '-inf', int(now), 'LIMIT', 0, most)) do
  local j = load(id)
  if j and is_live(j) then
    cancel(j, 'DISCONNECTED', now)
    cancelled[#cancelled + 1] = id
  else
    call('ZREM', P .. 'dt', id)
  end
end
local floor = math.huge
for _, mark in ipairs(call('HMGET', KEYS[1], 'floor', 'floor:0', 'floor:1', 'floor:2')) do
  if mark then floor = math.min(floor, tonumber(mark)) end
end
if floor == math.huge then floor = 0 end
for _, tenant in ipairs(call('ZRANGEBYSCORE', P .. 'vtc', '-inf', string.format('%.17g', floor), 'LIMIT', 0, most)) do
  if not call('HGET', P .. 'live', tenant) then
    call('ZREM', P .. 'vtc', tenant)
    call('HDEL', P .. 'credit', tenant)
  end
end
return { expired, cancelled, detached }
