#!lua flags=allow-oom
-- Hands jobs to a worker: class by class, the tenant with the least service first, each tenant's jobs in order of arrival.
-- A job that does not fit now holds back its class and those below (but for small jobs, see bypass): large ones would
-- starve otherwise. A job that can never fit on this worker is left for another.
-- ARGV  1 worker  2 call id  3 lease ms  4 most jobs  5 free KV slots  6 all KV slots  7 most bytes  8 deadline slack ms
--       9 expected completion tokens  10 bypass KV slots
-- Reply {{claimed job ...}, queued of class 0, 1, 2}. A repeated call id is answered with the same jobs.
--@include base
--@include jobs
--@include claims
local wid, call_id = ARGV[1], ARGV[2]
local max_jobs, free, total, bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local slack, expected, bypass = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local MAX_LOOKS = 512
local now = now_ms()
local claimed = {}

local function take(j)
  j.ep, j.nc, j.st, j.w, j.progress = j.ep + 1, j.nc + 1, 'R', wid, 0
  j.es = j.es .. int(j.ep) .. ':' .. int(j.n) .. ','
  unqueue(j)
  if j.sc == 0 then
    local counter = tonumber(call('ZSCORE', P .. 'vtc', j.t) or 0)
    if counter > tonumber(call('HGET', KEYS[1], 'floor') or 0) then call('HSET', KEYS[1], 'floor', counter) end
    j.sc, j.ch = now, INPUT_COST * j.pt + OUTPUT_COST * math.min(j.mx, expected)
    charge(j.t, j.ch / j.wt)
  end
  call('HSET', P .. 'j:' .. j.id, 'st', 'R', 'w', wid, 'ep', int(j.ep), 'nc', int(j.nc), 'es', j.es, 'sc', int(j.sc),
    'ch', int(j.ch))
  call('HSET', P .. 'w:' .. wid, j.id, run_record(j))
  call('ZADD', P .. 'dl', int(j.dl + slack), j.id) -- the worker ends it itself, with the text it has
  local e = entry(last_hash(j.id), j.ep, j.n)
  call('XADD', P .. 'j:' .. j.id .. ':log', int(j.ep) .. '-' .. int(j.n), 'e', e, 'k', 'T', 'y', wid)
  notify(j.gw, j.id, e, 'T')
  claimed[#claimed + 1] = pack_claim(j, now)
end

-- Takes jobs of one class. Returns why it ended early: 'blocked' by a job that does not fit now, 'full' at most bytes.
local function take_class(class, max_slots)
  local skipped_jobs, skipped_tenants, looks = {}, 0, 0
  while #claimed < max_jobs and looks < MAX_LOOKS do
    looks = looks + 1
    local tenant = call('ZRANGE', P .. 'act:' .. class, skipped_tenants, skipped_tenants)[1]
    if not tenant then break end
    local skipped = skipped_jobs[tenant] or 0
    local id = call('ZRANGE', P .. 'q:' .. class .. ':' .. tenant, skipped, skipped)[1]
    local j = id and load(id)
    if not id then
      skipped_tenants = skipped_tenants + 1
    elseif not j then
      unqueue({ id = id, c = class, t = tenant }) -- its hash was deleted by hand
      call('HINCRBY', P .. 'live', tenant, -1)
    elseif j.dl <= now then
      expire(j, now)
    elseif j.pk > total or j.kv + j.ct > max_slots then
      skipped_jobs[tenant] = skipped + 1
    elseif j.kv + j.ct > free then
      return 'blocked'
    else
      local size = claim_bytes(j)
      if size > bytes and #claimed > 0 then return 'full' end
      free, bytes = free - j.kv - j.ct, bytes - size
      take(j)
    end
  end
end

call('ZADD', P .. 'wl', int(now + ARGV[3]), wid)
local key = P .. 'wc:' .. wid
local last = call('GET', key)
if last and string.match(last, '^%S+') == call_id then
  for id in string.gmatch(string.sub(last, #call_id + 2), '%S+') do
    local j = load(id)
    if j and j.st == 'R' and j.w == wid then claimed[#claimed + 1] = pack_claim(j, now) end
  end
else
  local max_slots = math.huge
  for class = 0, CLASSES - 1 do
    local ended = take_class(class, max_slots)
    if ended == 'blocked' then max_slots = math.min(max_slots, bypass) end
    if ended == 'full' or max_slots == 0 then break end
  end
  local ids = { call_id }
  for i, job in ipairs(claimed) do ids[i + 1] = job[1] end
  call('SET', key, table.concat(ids, ' '), 'EX', 120)
  if num_queued() > 0 then ring() end -- chain wake-up: what is left may fit on another worker
end
return { claimed, unpack(queue_lengths()) }
