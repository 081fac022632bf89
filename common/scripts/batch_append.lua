#!lua
-- Keeps items of a batch that is being made, for a while. Without flags: at out of memory the server refuses it before it begins.
-- ARGV  1 ms that they are kept  2 index of the first  then items
-- Reply: how many there are now, or -1 if those before are gone. A repeat changes nothing.
--@include batches
local items, first, count = B .. ':items', tonumber(ARGV[2]), #ARGV - 2
local have = call('LLEN', items)
if have ~= first + count then
  if have ~= first then return -1 end
  call('RPUSH', items, unpack(ARGV, 3))
end
call('PEXPIRE', items, ARGV[1])
return first + count
