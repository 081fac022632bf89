#!lua flags=no-writes,allow-oom
-- What a shard's queue looks like now: how much waits, and for how long.
-- The jobs of a tenant and class wait in order of arrival, those that were requeued before all that never ran: the older of
-- the two heads is the oldest of them. Jobs that may only run alone stand in an index of their own. Of more tenants than are
-- looked at, those are taken that have had the least service (a job that does not fit stays there) and the most (their
-- turn comes last): among them is the oldest job, most likely.
-- ARGV  1 most tenants, and most jobs to run alone, looked at in all classes that have any  2 ms that a dead letter is kept at most
-- Reply {server time ms, running, dead letters, 1 if not all tenants were looked at or else 0,
--   {{waiting, ms since the oldest was accepted or -1, expected wait ms of the last or -1} of class 0, 1, 2},
--   {{class, tenant, waiting, ms since its oldest was accepted} ...}}
--@include base
--@include jobs
local kept_ms = tonumber(ARGV[2])
local now, more = now_ms(), 0

local function older(a, b)
  return a and b and math.min(a, b) or a or b
end

local function created(id)
  return tonumber(call('HGET', P .. 'j:' .. id, 'cr') or nil) -- nil: its hash was deleted by hand
end

local function oldest_in(q)
  local head, score = unpack(call('ZRANGE', q, 0, 0, 'WITHSCORES'))
  if not head then return nil end
  local oldest = created(head)
  if tonumber(score) >= 0 then return oldest end
  local first = call('ZRANGEBYSCORE', q, 0, '+inf', 'LIMIT', 0, 1)[1]
  return older(oldest, first and created(first))
end

local function tenants_of(class, most)
  local active = P .. 'act:' .. class
  if call('ZCARD', active) <= most then return call('ZRANGE', active, 0, -1) end
  more = 1
  local found, half = call('ZRANGE', active, 0, math.ceil(most / 2) - 1), math.floor(most / 2)
  if half > 0 then
    for _, tenant in ipairs(call('ZREVRANGE', active, 0, half - 1)) do found[#found + 1] = tenant end
  end
  return found
end

-- Adds each tenant's part of a class to `parts`. Returns when its oldest waiting job was accepted, or nil.
local function look_at(class, most, parts)
  local order, counts, heads, oldest = {}, {}, {}, nil
  local function add(tenant, count, head)
    if not counts[tenant] then
      order[#order + 1] = tenant
      counts[tenant] = 0
    end
    counts[tenant] = counts[tenant] + count
    heads[tenant] = older(heads[tenant], head)
    oldest = older(oldest, head)
  end
  for _, tenant in ipairs(tenants_of(class, most)) do
    local q = P .. 'q:' .. class .. ':' .. tenant
    add(tenant, call('ZCARD', q), oldest_in(q))
  end
  local alone = P .. 'alone:' .. class
  if call('ZCARD', alone) > most then more = 1 end
  for _, id in ipairs(call('ZRANGE', alone, 0, most - 1)) do
    local tenant = call('HGET', P .. 'j:' .. id, 't')
    if tenant then add(tenant, 1, created(id)) end
  end
  for _, tenant in ipairs(order) do
    local head = heads[tenant]
    if head then parts[#parts + 1] = { class, tenant, counts[tenant], math.max(0, now - head) } end
  end
  return oldest
end

local lengths, classes, parts, before, used = queue_lengths(), {}, {}, 0, 0
for _, waiting in ipairs(lengths) do
  if waiting > 0 then used = used + 1 end
end
for class, waiting in ipairs(lengths) do
  before = before + waiting
  local oldest = waiting > 0 and look_at(class - 1, math.ceil(ARGV[1] / used), parts)
  classes[class] = { waiting, oldest and math.max(0, now - oldest) or -1, waiting > 0 and expected_wait(before) or -1 }
end
local running = math.max(0, call('ZCARD', P .. 'dl') - before) -- every live job has a deadline
local letters = #call('ZRANGEBYSCORE', P .. 'failed', int(now - kept_ms), '+inf')
return { now, running, letters, more, classes, parts }
