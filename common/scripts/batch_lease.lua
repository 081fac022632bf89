#!lua flags=allow-oom
-- Takes or renews the lease by which one gateway at a time feeds a batch.
-- ARGV  1 gateway  2 its epoch, 0 to take the lease  3 lease ms, 0 to give it up  4 items in the queue
--       5 from which item on none will have been fed before the next call
-- Reply {OK, ms until the batch's deadline, batch} and, where it was taken, the bits of items with a result;
--       {HELD} by another gateway | {LOST} to another | {ENDED}, or there is none
--@include batches
local fields = call('HMGET', B, 'st', 'ep', 'ho', 'le', 'dl', 'hw')
if not fields[1] or not is_live(fields[1]) then return { 'ENDED' } end
local now = now_ms()
local epoch, taken = tonumber(ARGV[2]), tonumber(ARGV[2]) == 0
if taken then
  if fields[3] ~= ARGV[1] and tonumber(fields[4]) > now then return { 'HELD' } end
  epoch = fields[2] + 1
elseif epoch ~= tonumber(fields[2]) then
  return { 'LOST' }
end
local lease = tonumber(ARGV[3])
call('HSET', B, 'ep', int(epoch), 'ho', ARGV[1], 'le', lease > 0 and int(now + lease) or 0, 'ru', ARGV[4],
  'hw', int(math.max(tonumber(fields[6]), tonumber(ARGV[5]))))
local reply = { 'OK', int(fields[5] - now), describe() }
if taken then reply[4] = call('GET', B .. ':done') or '' end
return reply
