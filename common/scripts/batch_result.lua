#!lua flags=allow-oom
-- Appends results of items that have none yet. With the last one the batch ends.
-- ARGV  1 epoch of the feeder  then of each result: item index, counter (ok, er or ca), entry of the list
-- Reply {OK, how many were appended, state} | {LOST} to another feeder | {ENDED}, or there is none
--@include batches
local fields = call('HMGET', B, 'st', 'ep', 'de', 'dl', 'rt', 'total', 'ik')
if not fields[1] or not is_live(fields[1]) or fields[3] then return { 'ENDED' } end
if fields[2] ~= ARGV[1] then return { 'LOST' } end
local num_appended = 0
for i = 2, #ARGV, 3 do
  local index = tonumber(ARGV[i])
  if call('GETBIT', B .. ':done', index) == 0 then -- mutant: once
    call('SETBIT', B .. ':done', index, 1)
    call('RPUSH', B .. ':results', ARGV[i + 2])
    call('HINCRBY', B, ARGV[i + 1], 1)
    num_appended = num_appended + 1
  end
end

local state, now, retention = fields[1], now_ms(), tonumber(fields[5])
local counts = call('HMGET', B, 'ok', 'er', 'ca')
if counts[1] + counts[2] + counts[3] >= tonumber(fields[6]) then
  state = state == 'X' and 'C' or 'D'
  call('HSET', B, 'st', state, 'en', int(now), 'ru', 0)
  call('DEL', B .. ':items', B .. ':done')
  call('PEXPIRE', B, int(retention))
  call('PEXPIRE', B .. ':results', int(retention))
  if fields[7] ~= '' then call('PEXPIRE', P .. 'bi:' .. fields[7], int(retention)) end
elseif num_appended > 0 then
  local kept = int(math.max(1, fields[4] + retention - now))
  call('PEXPIRE', B .. ':results', kept)
  call('PEXPIRE', B .. ':done', kept)
end
return { 'OK', num_appended, state }
