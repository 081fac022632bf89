#!lua flags=allow-oom
-- Erases a batch. Of one that runs, its items stay until its feeder has ended their jobs and erases it; nobody else sees it.
-- ARGV  1 '1': also one that runs
-- Reply 1, or nil if there is no such batch
--@include batches
local fields = call('HMGET', B, 'st', 'de', 'ik')
if not fields[1] then return false end
if ARGV[1] == '1' or not is_live(fields[1]) then
  erase()
  return 1
end
if fields[2] then return false end
if fields[3] ~= '' then call('DEL', P .. 'bi:' .. fields[3]) end
call('HSET', B, 'st', 'X', 'de', '1', 'ik', '')
call('DEL', B .. ':results')
call('ZREM', P .. 'batches', ID)
return 1
