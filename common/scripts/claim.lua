#!lua flags=allow-oom
-- Hands jobs to a worker: class by class, the tenant with the least service first, each tenant's jobs in order of arrival.
-- A job that does not fit now holds back its class and those below (but for small jobs, see bypass): large ones would
-- starve otherwise. A job that can never fit on this worker is left for another.
--
-- A class below the highest has a share of the service, as it is charged in advance, while it has jobs waiting: its
-- credit, {s}:meta share:<class>, grows by that part of all service handed out, and falls by its own. Once the credit
-- covers its first job, that goes before all other classes, and what does not fit then holds those back. So in any time in
-- which a class has jobs waiting, it is handed out at least its share, less the cost of two of the largest jobs: of its
-- own first one, and its part of what goes to another class that is due at once. The credit ends with the last waiting
-- job; where a worker can take none, it grows to the cost of the first and one gain. Jobs that run alone do not count.
--
-- A job that ended several workers in a row before it made progress (see queue) runs alone, so that it takes nobody with
-- it: it, or the job beside it, may be what ends them. One worker at a time is reserved for such jobs, by {s}:meta alone
-- "<worker> <until ms> <id or ->": the first that meets one claims nothing more until it is empty, then takes it, and
-- claims nothing beside it until it has made progress, has ended or was lost. An empty worker need not wait for one that
-- still has other work. All others pass over it. The reservation ends with the worker's lease, and unless its next claim
-- comes in time. Between two such jobs workers with other work go on with it for a lease, {s}:meta rest: where many are
-- innocent, since a host died and not its worker, they must not take a worker's whole time one after another.
-- ARGV  1 worker  2 call id  3 lease ms  4 most jobs  5 free KV slots  6 all KV slots  7 most bytes  8 deadline slack ms
--       9 expected completion tokens  10 bypass KV slots  11 share of the service of each class below the highest
-- Reply {{claimed job ...}, queued of class 0, 1, 2}. A repeated call id is answered with the same jobs.
--@marks share:1 share:2 gap handed alone rest
--@include base
--@include jobs
--@include claims
local wid, call_id = ARGV[1], ARGV[2]
local max_jobs, free, total, bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local slack, expected, bypass = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local share = tonumber(ARGV[11])
local MAX_LOOKS = 512
local MAX_ALONE_LOOKS = 64
local GAP_KEPT = 0.8
local RESERVED_LEASES = 3 -- without a claim; a worker whose cache is full makes none
local now = now_ms()
local claimed = {}

-- Service that it takes from here on: until now what it has emitted was prompt too. First charged to its tenant as this.
local function cost(j)
  return INPUT_COST * (j.pt + j.ct) + OUTPUT_COST * math.min(math.max(j.mx - j.ct, 0), expected)
end

local function take(j)
  j.ep, j.nc, j.st, j.w, j.progress = j.ep + 1, j.nc + 1, 'R', wid, 0
  j.es = j.es .. int(j.ep) .. ':' .. int(j.n) .. ','
  local counter = tonumber(call('ZSCORE', P .. 'vtc', j.t) or counter_of(j.t))
  unqueue(j)
  if j.sc == 0 then
    j.sc, j.ch = now, cost(j)
    charge(j.t, j.ch / j.wt, counter)
    move_floor(j.c, counter)
  end
  call('HSET', P .. 'j:' .. j.id, 'st', 'R', 'w', wid, 'ep', int(j.ep), 'nc', int(j.nc), 'es', j.es, 'sc', int(j.sc),
    'ch', int(j.ch))
  call('HSET', P .. 'w:' .. wid, j.id, run_record(j))
  call('ZADD', P .. 'dl', int(j.dl + slack), j.id) -- the worker ends it itself, with the text it has
  j.hash = j.ep > 1 and last_hash(j.id) or EMPTY_HASH -- nothing is written before the first epoch
  local e = entry(j.hash, j.ep, j.n)
  call('XADD', P .. 'j:' .. j.id .. ':log', int(j.ep) .. '-' .. int(j.n), 'e', e, 'k', 'T', 'y', wid)
  notify(j.gw, j.id, e, 'T')
  claimed[#claimed + 1] = pack_claim(j, now)
end

local lengths = queue_lengths()
local walks = {} -- by class: what was looked at and left
local heads = {} -- by class: cost of its first job, where known
local credits = {} -- by class, see above
local tried = {} -- classes of which this worker can take nothing now
for c = 1, CLASSES - 1 do credits[c] = tonumber(marks[c] or 0) end
for c = 0, CLASSES - 1 do walks[c] = { jobs = {}, tenants = 0, looks = 0 } end

-- Counts service against the shares of the classes.
local function serve(class, amount)
  local gain = share * amount -- mutant: share
  for c = 1, CLASSES - 1 do
    if lengths[c + 1] == 0 then
      credits[c] = 0
    elseif c == class then
      credits[c] = math.max(0, credits[c] + gain - amount)
    else
      local most = tried[c] and math.max(credits[c], (heads[c] or 0) + gain) or math.huge
      credits[c] = math.min(credits[c] + gain, most)
    end
  end
end

-- Takes jobs of one class until so many are claimed, each within `credit`. Returns why it ended early: 'blocked' by a job
-- that does not fit now, 'full' at most bytes, 'poor' before a job that costs more.
local function take_class(class, max_slots, most, credit)
  local walk = walks[class]
  while #claimed < most and walk.looks < MAX_LOOKS do
    walk.looks = walk.looks + 1
    local tenant = call('ZRANGE', P .. 'act:' .. class, walk.tenants, walk.tenants)[1]
    if not tenant then break end
    local skipped = walk.jobs[tenant] or 0
    local id = call('ZRANGE', P .. 'q:' .. class .. ':' .. tenant, skipped, skipped)[1]
    local j = id and load(id)
    if not id then
      walk.tenants = walk.tenants + 1
    elseif not j then
      unqueue({ id = id, c = class, t = tenant }) -- its hash was deleted by hand
      call('HINCRBY', P .. 'live', tenant, -1)
    elseif j.dl <= now then
      expire(j, now)
    elseif j.at >= MAX_ATTEMPTS_IN_COMPANY then
      unqueue(j) -- put here by a program that does not know of jobs to run alone
      queue(j, int(j.s - AHEAD))
    elseif j.pk > total or slots(j) > max_slots then
      walk.jobs[tenant] = skipped + 1
      heads[class] = heads[class] or cost(j)
    elseif credit and cost(j) > credit then
      heads[class] = cost(j)
      return 'poor'
    elseif slots(j) > free then
      return 'blocked'
    else
      local size = claim_bytes(j)
      if size > bytes and #claimed > 0 then return 'full' end
      free, bytes = free - slots(j), bytes - size
      heads[class] = nil
      serve(class, cost(j))
      if credit then
        j.fl = 1
        call('HSET', P .. 'j:' .. j.id, 'fl', 1)
      end
      take(j)
    end
  end
end

-- Takes one job of a class below this one whose share is due. Returns its class and why that ended early, or nil.
local function take_by_share(class, max_slots)
  for c = class + 1, CLASSES - 1 do
    if share > 0 and lengths[c + 1] > 0 and not tried[c] and credits[c] >= (heads[c] or 0) then
      local before = #claimed
      local ended = take_class(c, max_slots, before + 1, credits[c])
      tried[c] = #claimed == before and ended ~= 'poor'
      if #claimed > before or ended == 'blocked' or ended == 'full' then return c, ended end
    end
  end
end

local function take_in_order()
  local class, max_slots = 0, math.huge
  while class < CLASSES and #claimed < max_jobs and max_slots > 0 do
    lengths = queue_lengths()
    local is_empty = lengths[class + 1] == 0
    local by_share, ended
    if not is_empty then by_share, ended = take_by_share(class, max_slots) end
    if is_empty then
      class = class + 1
    elseif not by_share then
      local before = #claimed
      ended = take_class(class, max_slots, share > 0 and before + 1 or max_jobs) -- the shares of others grow with each
      if ended or #claimed == before then class = class + 1 end
    end
    if ended == 'full' then return end
    if ended == 'blocked' then max_slots = math.min(max_slots, bypass) end
  end
end

-- The first job to run alone that this worker could hold.
local function first_alone()
  for class = 0, CLASSES - 1 do
    for _, id in ipairs(call('ZRANGE', P .. 'alone:' .. class, 0, MAX_ALONE_LOOKS - 1)) do
      local j = load(id)
      if not j or j.st ~= 'Q' then
        unqueue({ id = id, c = class, t = j and j.t or '' }) -- its hash was deleted by hand, or it ended by other hands
      elseif j.dl <= now then
        expire(j, now)
      elseif j.pk <= total then
        return j
      end
    end
  end
end

-- The worker that is reserved for jobs to run alone, and the one that it runs without progress so far; nil if there is none.
local function reserved(mark)
  local holder, till, id = string.match(mark, '^(%S+) (%d+) (%S+)$')
  if not holder then return nil end
  local record = id ~= '-' and call('HGET', P .. 'w:' .. holder, id)
  if record then
    local j = { id = id }
    read_counters(j, string.sub(record, 21, 60))
    if j.progress == 0 then return holder, id end
  elseif id == '-' and tonumber(till) > now and tonumber(call('ZSCORE', P .. 'wl', holder) or 0) > now then
    return holder
  end
end

-- Reserves this worker for a job to run alone, or hands that out. Returns whether it may claim nothing else.
local function take_alone()
  local mark, rest = marks[5], marks[6]
  if not mark and call('EXISTS', P .. 'alone:0', P .. 'alone:1', P .. 'alone:2') == 0 then return false end
  local holder, running = reserved(mark or '')
  if running then return holder == wid end
  local is_empty = call('EXISTS', P .. 'w:' .. wid) == 0
  if holder and holder ~= wid and not is_empty then return false end
  local rests_ms = tonumber(rest or 0) - now -- more than a lease: from before the clock went back
  if not holder and not is_empty and rests_ms > 0 and rests_ms <= tonumber(ARGV[3]) then return false end
  local j = first_alone()
  if not j then
    if not holder or holder == wid then call('HDEL', KEYS[1], 'alone') end
    return false
  end
  local runs = is_empty and slots(j) <= free
  if runs then
    take(j)
    call('HSET', KEYS[1], 'rest', int(now + ARGV[3]))
  end
  call('HSET', KEYS[1], 'alone', wid .. ' ' .. int(now + RESERVED_LEASES * ARGV[3]) .. ' ' .. (runs and j.id or '-'))
  return true
end

-- How fast jobs are handed out while some wait, for their expected wait: {s}:meta gap, ms for each job, an average over
-- the last ones; handed, when that was done last, if jobs have waited ever since.
local function note_gap(gap, handed)
  if #claimed == 0 then return end
  if handed and handed <= now then
    local one, kept = (now - handed) / #claimed, GAP_KEPT ^ #claimed
    gap = gap and gap * kept + one * (1 - kept) or one
    call('HSET', KEYS[1], 'gap', string.format('%.3f', gap))
  end
  if num_queued() > 0 then call('HSET', KEYS[1], 'handed', int(now)) end
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
  if not take_alone() then take_in_order() end
  note_gap(tonumber(marks[3]), tonumber(marks[4]))
  lengths = queue_lengths()
  for c = 1, CLASSES - 1 do
    if lengths[c + 1] > 0 and share > 0 then call('HSET', KEYS[1], 'share:' .. c, string.format('%.17g', credits[c])) end
  end
  local ids = { call_id }
  for i, job in ipairs(claimed) do ids[i + 1] = job[1] end
  call('SET', key, table.concat(ids, ' '), 'EX', 120)
  if num_queued() > 0 then ring() end -- chain wake-up: what is left may fit on another worker
end
return { claimed, unpack(queue_lengths()) }
