#!lua flags=allow-oom
-- Reads a job's log after an event, and (unless only reading) sends its further events to this gateway.
-- ARGV  1 id  2 tenant  3 gateway, or '' to read only  4 after event  5 chain hash of that event, or ''
--       6 most events  7 most bytes  8 gateway lease ms  9 reply TTL ms  10 attach id  11 '1': only if no
--       other call has attached since this one did, whose gateway's lease has ended meanwhile
-- Reply {OK, described job, 1 if the log goes on, entries ...} | {OUT_OF_RANGE, events} | {RESULT_LOST} | {SUPERSEDED}, or nil
-- if there is no such job for this tenant. The gateway that had the stream gets an item of kind S.
--@include base
--@include jobs
if not is_of(ARGV[1], ARGV[2]) then return false end
local j = load(ARGV[1])
local gid, after, hash, now = ARGV[3], tonumber(ARGV[4]), ARGV[5], now_ms()
local log = P .. 'j:' .. j.id .. ':log'
if ARGV[11] == '1' and is_live(j) and j.ai ~= ARGV[10] then return { 'SUPERSEDED' } end
if after > j.n then
  if hash ~= '' then return { 'RESULT_LOST' } end -- the caller has seen what is not there any more
  return { 'OUT_OF_RANGE', j.n }
end

-- The epoch that wrote event k is the last that began with fewer events in the log.
local function epoch_of(k)
  local epoch
  for ep, before in string.gmatch(j.es, '(%d+):(%d+),') do
    if tonumber(before) < k then epoch = ep end
  end
  return epoch
end

local from = '-'
if after > 0 then
  from = epoch_of(after) .. '-' .. int(after)
  local entry_after = call('XRANGE', log, from, from)[1]
  if not entry_after or (hash ~= '' and hash_of(entry_after[2][2]) ~= hash) then return { 'RESULT_LOST' } end
  from = '(' .. from
elseif hash ~= '' and hash ~= EMPTY_HASH then
  return { 'RESULT_LOST' }
end

local entries, left, bytes = {}, tonumber(ARGV[6]), tonumber(ARGV[7])
local at_end = false
while left > 0 and bytes > 0 and not at_end do
  local page = call('XRANGE', log, from, '+', 'COUNT', 64)
  for _, found in ipairs(page) do
    if left == 0 or bytes <= 0 then break end
    from = '(' .. found[1]
    if found[2][4] ~= 'T' then
      entries[#entries + 1] = found[2]
      left, bytes = left - 1, bytes - #found[2][2]
    end
  end
  at_end = #page < 64
end
local more = j.n > after + #entries and 1 or 0

if gid ~= '' then
  renew_gateway(gid, tonumber(ARGV[8]), tonumber(ARGV[9]), now)
  if is_live(j) then
    if j.gw ~= gid then
      if j.gw ~= '' then
        call('SREM', P .. 'g:' .. j.gw, j.id)
        notify(j.gw, j.id, entry(last_hash(j.id), j.ep, j.n), 'S')
      end
      j.gw = gid
      if j.st == 'R' then call('HSET', P .. 'w:' .. j.w, j.id, run_record(j)) end
    end
    call('HSET', P .. 'j:' .. j.id, 'gw', gid, 'ai', ARGV[10])
    call('SADD', P .. 'g:' .. gid, j.id)
    call('ZREM', P .. 'dt', j.id)
  end
end
return { 'OK', describe(j), more, entries }
