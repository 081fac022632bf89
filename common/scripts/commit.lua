#!lua flags=allow-oom
-- One engine step of a worker: fences every held job, appends events to the logs, one reply entry per gateway. Also the
-- way in which a worker learns that it lost a job. All is checked before anything of a job is written: a job that fails
-- its check is reported and the rest goes on.
-- ARGV  1 worker  2 lease ms  3 number of events  4 number of terminals
--       events:    id  entry id  record before (20)  record after (60)  e
--       terminals: the same five  kind  reason
--       then held jobs without an event: id  "<epoch>-"
-- Reply {{lost id, why ...}, more jobs here than named 0|1, queued of class 0, 1, 2}. A repeat changes nothing.
--@include base
--@include jobs
local sub = string.sub
local wid, num_events, num_terminals = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local records = P .. 'w:' .. wid
local UNPACK = 1000 -- Lua's stack takes a few thousand values
local now = now_ms()
-- Not for less than a tenth of it: a commit without events then writes nothing, and need not be synced to disk.
local lease = tonumber(call('ZSCORE', P .. 'wl', wid) or 0)
if lease < now + 0.9 * ARGV[2] or lease > now + ARGV[2] then
  call('ZADD', P .. 'wl', 'XX', int(now + ARGV[2]), wid)
end

local ids, first_terminal = {}, 5 + 5 * num_events
local first_held = first_terminal + 7 * num_terminals
for i = 1, num_events do ids[i] = ARGV[5 * i] end
for i = 1, num_terminals do ids[num_events + i] = ARGV[first_terminal + 7 * (i - 1)] end
for at = first_held, #ARGV, 2 do ids[#ids + 1] = ARGV[at] end
local stored = {}
for from = 1, #ids, UNPACK do
  local part = call('HMGET', records, unpack(ids, from, math.min(from + UNPACK - 1, #ids)))
  for i, record in ipairs(part) do stored[from + i - 1] = record end
end

local lost, kept = {}, 0
local function lose(id, record, before)
  local same_epoch = record and before and string.match(record, '^%d+%-') == string.match(before, '^%d+%-')
  lost[#lost + 1] = id
  lost[#lost + 1] = same_epoch and 'diverged' or why_lost(id)
end

local pieces_of, num_items = {}, {} -- by gateway: pieces of its stream entry, four for each item after the array's head
local function item(gw, id, entry_id, e, kind, reason)
  if gw == NO_GATEWAY then return end
  local pieces, k = pieces_of[gw], num_items[gw]
  if not pieces then
    pieces, k = { '' }, 0
    pieces_of[gw] = pieces
  end
  num_items[gw] = k + 1
  k = 1 + 4 * k
  local is_large = #e > MAX_REPLY_ITEM_BYTES
  if is_large then
    local ep, n = string.match(entry_id, '^(%d+)%-(%d+)$')
    e = entry(hash_of(e), tonumber(ep), tonumber(n))
  end
  pieces[k + 1] = kind and '\151\217' or '\149\217'
  pieces[k + 2] = string.char(#id)
  pieces[k + 3] = id
  pieces[k + 4] = kind and e .. text(kind) .. text(reason) or e
end

-- When the first token was committed: the one time that a commit touches the job's own hash before its end.
local function note_first_token(id, record, after)
  if sub(record, 21, 22) == '0 ' and sub(after, 21, 22) ~= '0 ' then
    call('HSET', P .. 'j:' .. id, 'ft', int(now))
  end
end

local writes, num_writes = {}, 0
for i = 1, num_events do
  local at = 5 * i
  local id, entry_id, before, after, e = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local record = stored[i]
  if record and sub(record, 1, 20) == before then -- mutant: fence
    call('XADD', P .. 'j:' .. id .. ':log', entry_id, 'e', e)
    note_first_token(id, record, after)
    local gw = sub(record, 61)
    writes[num_writes + 1] = id
    writes[num_writes + 2] = after .. gw
    num_writes = num_writes + 2
    kept = kept + 1
    item(gw, id, entry_id, e)
  elseif record and sub(record, 1, 20) == sub(after, 1, 20) then -- mutant: repeat
    kept = kept + 1
  else
    lose(id, record, before)
  end
end
for from = 1, num_writes, UNPACK do
  call('HSET', records, unpack(writes, from, math.min(from + UNPACK - 1, num_writes)))
end

for i = 1, num_terminals do
  local at = first_terminal + 7 * (i - 1)
  local id, entry_id, before, after, e = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local kind, reason = ARGV[at + 5], ARGV[at + 6]
  local record = stored[num_events + i]
  if record and sub(record, 1, 20) == before then -- mutant: fence
    local j = load(id)
    local ep, n = string.match(entry_id, '^(%d+)%-(%d+)$')
    j.ep, j.n = tonumber(ep), tonumber(n)
    read_counters(j, sub(after, 21))
    call('XADD', P .. 'j:' .. id .. ':log', entry_id, 'e', e, 'k', kind, 'y', reason)
    note_first_token(id, record, after)
    take_from_worker(j)
    settle(j, kind, reason, now)
    item(sub(record, 61), id, entry_id, e, kind, reason)
  else
    local done = call('HMGET', P .. 'j:' .. id, 'st', 'ep', 'n')
    if done[1] ~= kind or done[2] .. '-' .. done[3] ~= entry_id then lose(id, record, before) end
  end
end

for at = first_held, #ARGV, 2 do
  local record = stored[num_events + num_terminals + (at - first_held) / 2 + 1]
  local epoch = ARGV[at + 1]
  if record and sub(record, 1, #epoch) == epoch then kept = kept + 1 else lose(ARGV[at], record) end
end

for gw, pieces in pairs(pieces_of) do
  pieces[1] = array_head(num_items[gw])
  send(gw, table.concat(pieces))
end

return { lost, call('HLEN', records) > kept and 1 or 0, unpack(queue_lengths()) }
